r"""MME-SID, the methods of its Table 3 and its ablations on MovieLens-1M, with a base that trains on a CPU.

Paper:     MME-SID (CIKM 2025), Table 3 and section 5.3, whose data sets are others
Run:       python recipes/methods_ml1m.py --set prepare_data.interactions=interactions.csv \
               prepare_data.items=items.csv encode_items.text.model=sentence-transformers/all-MiniLM-L6-v2
           python recipes/methods_ml1m.py --rows mme_sid e4srec --seeds 0 1 2   (some of it)
           python recipes/methods_ml1m.py --summarise   (the table of what is finished so far)
Settings:  those of recipes/mme_sid_ml1m_mini.py for every row, the learning rate too; three modalities
"""

from mme_sid_ml1m_mini import recipe as mini

from llmrec.finetune.compare import main
from llmrec.recipe import Recipe


def recipe() -> Recipe:
    return mini()


if __name__ == "__main__":
    main(recipe, description=__doc__)
