"""Train sequence models side by side on a prepared data set, several seeds each; one table, one page.

python tools/compare_providers.py --prepare-data runs/x/prepare_data --rows sasrec gmvae --seeds 0 1 2
"""

from llmrec.collab.compare_cli import main

if __name__ == "__main__":
    main(description=__doc__)
