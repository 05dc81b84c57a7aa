"""MME-SID, the methods it is compared with and its ablations, with the data and settings of any recipe.

python tools/compare_methods.py recipes/mme_sid_sample.py --rows mme_sid e4srec concat --seeds 0 1 2
"""

from llmrec.finetune.compare import main

if __name__ == "__main__":
    main(description=__doc__)
