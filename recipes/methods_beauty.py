r"""MME-SID, the methods of its Table 3 and its ablations on Amazon Beauty, with a base that trains on a CPU.

Paper:     MME-SID (CIKM 2025), Table 3 and section 5.3
Run:       python recipes/methods_beauty.py --set prepare_data.interactions=interactions.csv \
               prepare_data.items=items.csv encode_items.text.model=sentence-transformers/all-MiniLM-L6-v2
           python recipes/methods_beauty.py --rows mme_sid e4srec --seeds 0 1 2   (some of it)
           python recipes/methods_beauty.py --summarise   (the table of what is finished so far)
Settings:  those of recipes/mme_sid_beauty_mini.py for every row, the learning rate too; two modalities
Results:   README of this folder
"""

from mme_sid_beauty_mini import recipe as mini

from llmrec.finetune.compare import main
from llmrec.recipe import Recipe


def recipe() -> Recipe:
    return mini()


if __name__ == "__main__":
    main(recipe, description=__doc__)
