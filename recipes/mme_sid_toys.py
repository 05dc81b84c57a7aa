"""MME-SID on Amazon Toys & Games: mme_sid_beauty.py with the learning rate of the paper's Table 4.

Paper:     MME-SID (CIKM 2025), Table 4: learning rate 2e-4, 3 epochs, 100 warm-up steps, 256 codes
Run:       accelerate launch recipes/mme_sid_toys.py
Needs:     as mme_sid_beauty.py
Not run:   no GPU was at hand when this was written
"""

from dataclasses import replace

from mme_sid_beauty import recipe as mme_sid_beauty

from llmrec.recipe import Recipe, main


def recipe() -> Recipe:
    base = mme_sid_beauty("toys_and_games")
    return replace(base, finetune=replace(base.finetune, learning_rate=2e-4))


if __name__ == "__main__":
    main(recipe)
