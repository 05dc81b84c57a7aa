"""MME-SID on Amazon Sports & Outdoors: mme_sid_beauty.py with the settings of the paper's Table 4.

Paper:     MME-SID (CIKM 2025), Table 4: learning rate 2e-4, 2 epochs, 200 warm-up steps, 300 codes
Run:       accelerate launch recipes/mme_sid_sports.py
Needs:     as mme_sid_beauty.py
Not run:   no GPU was at hand when this was written
"""

from dataclasses import replace

from mme_sid_beauty import recipe as mme_sid_beauty

from llmrec.recipe import Recipe, main


def recipe() -> Recipe:
    base = mme_sid_beauty("sports_and_outdoors")
    return replace(
        base,
        learn_semantic_ids=replace(base.learn_semantic_ids, num_codes=300),
        finetune=replace(base.finetune, learning_rate=2e-4, epochs=2, warmup_steps=200),
    )


if __name__ == "__main__":
    main(recipe)
