"""Valid and test items must not reach anything that is trained (design: contract on splits)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import interactions

from llmrec.collab.config import SASRecConfig, TrainCollabConfig
from llmrec.collab.train import train_collab
from llmrec.contents import content_of
from llmrec.encoders.config import EncodeItemsConfig, ImageEncoderConfig, TextEncoderConfig
from llmrec.encoders.encode import encode_items
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig, MiniConfig
from llmrec.finetune.train import finetune
from llmrec.interactions import Interactions
from llmrec.semantic_ids.config import LearnSemanticIdsConfig
from llmrec.semantic_ids.learn import learn_semantic_ids

NUM_ITEMS = 30


def market() -> Interactions:
    rng = np.random.default_rng(3)
    words = ("red", "blue", "tea", "pot", "drum", "kite", "lamp")
    titles = [" ".join(rng.choice(words, 3, replace=False)) for _ in range(NUM_ITEMS)]
    sequences = [rng.permutation(NUM_ITEMS)[: rng.integers(4, 12)] + 1 for _ in range(80)]
    return interactions([row.tolist() for row in sequences], NUM_ITEMS, titles=titles)


def changed(data: Interactions, splits: tuple[int, ...]) -> Interactions:
    """The same data with other items in the given splits."""
    item = data.item.copy()
    chosen = np.isin(data.split, splits)
    item[chosen] = item[chosen] % NUM_ITEMS + 1
    return dataclasses.replace(data, item=item)


def upstream_of_evaluate(
    data: Interactions, select: str, folder: Path, *, include_valid: bool = False
) -> dict[str, Any]:
    """Every file of every stage between prepare_data and evaluate, without what a clock says."""
    collab = train_collab(
        TrainCollabConfig(
            sasrec=SASRecConfig(embed_dim=8, num_layers=1, num_heads=1, inner_dim=16),
            epochs=2,
            select=select,
            include_valid=include_valid,
        ),
        data,
    )
    content = encode_items(
        EncodeItemsConfig(text=TextEncoderConfig(dim=4), image=ImageEncoderConfig(encoder="none")), data
    )
    ids = learn_semantic_ids(
        LearnSemanticIdsConfig(num_codes=4, num_levels=2, code_dim=8, hidden_dims=(16,), epochs=5),
        data,
        collab,
        content,
    )
    adapter = finetune(
        FinetuneConfig(
            mini=MiniConfig(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=16),
            prompt="compact",
            fusion_temperature=1.0,
            epochs=1,
            batch_size=100,
            eval_every_epochs=0 if select == "last" else 1,
            select=select,
            include_valid=include_valid,
        ),
        data,
        collab,
        content,
        ids,
    )
    for artifact in (collab, content, ids, adapter):
        (folder / artifact.stage).mkdir(parents=True)
        artifact.save(folder / artifact.stage)
    return content_of(folder)


@pytest.mark.parametrize(
    ("splits", "select"), [((2,), "valid"), ((1, 2), "last")], ids=["test items", "valid and test items"]
)
def test_other_targets_leave_every_upstream_file_identical(splits, select, tmp_path):
    data = market()
    before = upstream_of_evaluate(data, select, tmp_path / "before")
    after = upstream_of_evaluate(changed(data, splits), select, tmp_path / "after")
    assert len(before) >= 12
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_other_train_items_do_change_the_files(tmp_path):
    """The comparison above can fail."""
    data = market()
    item = data.item.copy()
    first = data.offset[:-1]
    item[first] = item[first] % NUM_ITEMS + 1
    count = np.bincount(item[data.split == 0], minlength=NUM_ITEMS + 1)[1:]
    place = data.items.column_names.index("train_count")
    other = dataclasses.replace(data, item=item, items=data.items.set_column(place, "train_count", [count]))
    before = upstream_of_evaluate(data, "last", tmp_path / "before")
    after = upstream_of_evaluate(other, "last", tmp_path / "after")
    different = {name for name in before if before[name] != after[name]}
    assert {"train_collab/item_embeddings.safetensors", "finetune/heads.safetensors"} <= different


def test_a_refit_learns_from_validation_items_and_never_from_test_items(tmp_path):
    def files(data: Interactions, name: str) -> dict[str, Any]:
        return upstream_of_evaluate(data, "last", tmp_path / name, include_valid=True)

    before = files(market(), "before")
    assert files(changed(market(), (2,)), "test") == before
    valid = files(changed(market(), (1,)), "valid")
    assert valid["train_collab/model.safetensors"] != before["train_collab/model.safetensors"]
    assert valid["finetune/heads.safetensors"] != before["finetune/heads.safetensors"]


def test_vectors_that_know_the_validation_items_are_not_validated_on_them(tmp_path):
    data = market()
    sasrec = SASRecConfig(embed_dim=8, num_layers=1, num_heads=1, inner_dim=16)
    config = TrainCollabConfig(sasrec=sasrec, epochs=1, select="last", include_valid=True)
    collab = train_collab(config, data)
    assert collab.knows_valid and collab.metrics["trained_on"] == ["train", "valid"]
    text, image = TextEncoderConfig(dim=4), ImageEncoderConfig(encoder="none")
    content = encode_items(EncodeItemsConfig(text=text, image=image), data)
    ids = learn_semantic_ids(
        LearnSemanticIdsConfig(num_codes=4, num_levels=2, code_dim=8, hidden_dims=(16,), epochs=5),
        data,
        collab,
        content,
    )
    with pytest.raises(ConfigError, match=r"set finetune\.eval_every_epochs=0 and finetune\.select=last"):
        finetune(FinetuneConfig(mini=MiniConfig(hidden_size=8, num_heads=1)), data, collab, content, ids)
    with pytest.raises(ConfigError, match="so they cannot choose the epoch"):
        TrainCollabConfig(include_valid=True)
