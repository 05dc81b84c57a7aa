"""MOTOR: its item vectors against plain loops, and the codes they are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, batch
from test_content import twins

from llmrec.artifacts import CollabEmbeddings
from llmrec.collab.motor import CrossedCodes, Motor
from llmrec.collab.provider import load_provider
from llmrec.collab.sasrec import SASRec
from llmrec.collab.train import train_collab


@torch.no_grad()
@pytest.mark.parametrize("num_crosses", [1, 2])
def test_item_vectors_are_those_of_a_loop_over_items(num_crosses):
    torch.manual_seed(0)
    table = CrossedCodes(
        num_items=9, num_places=3, num_codes=4, num_crosses=num_crosses, embed_dim=5
    ).double()
    for weight in table.parameters():
        weight.copy_(torch.randn_like(weight))
    found = table()
    assert found.shape == (10, 5) and not found[0].any()
    for item in range(1, 10):
        own = [table.token.weight[4 * place + int(table.codes[item, place])] for place in range(3)]
        first = crossed = torch.cat(own)
        for layer in table.crosses:
            crossed = first * (layer.weight @ crossed + layer.bias) + crossed
        torch.testing.assert_close(found[item], table.out.weight @ crossed)


@torch.no_grad()
def test_it_is_sasrec_with_these_vectors_in_place_of_a_table():
    settings = CASES["motor-ce"].config().of_model
    model = Motor(num_items=20, **settings).eval()
    of_codes = ("content", "quantizer", "num_levels", "num_codes", "num_crosses")
    plain = SASRec(num_items=20, **{name: value for name, value in settings.items() if name not in of_codes})
    shared = {name: weight for name, weight in model.state_dict().items() if not name.startswith("items.")}
    plain.load_state_dict(shared | {"item.weight": model.item_embeddings()})
    plain.eval()
    history = torch.tensor([[3, 1, 4], [2, 0, 0]])
    torch.testing.assert_close(model.score(history), plain.score(history))
    torch.testing.assert_close(model.loss(batch([3, 1, 4, 2])).total, plain.loss(batch([3, 1, 4, 2])).total)


def test_item_vectors_begin_as_spread_as_those_of_a_table():
    torch.manual_seed(0)
    made = CrossedCodes(num_items=500, num_places=8, num_codes=32, num_crosses=2, embed_dim=64)()
    assert 0.015 < float(made[1:].detach().std()) < 0.025


@pytest.mark.parametrize("quantizer", ["residual", "product"])
def test_codes_are_made_of_content_and_kept_with_the_weights(quantizer, tmp_path, caplog):
    data, content, look = twins()
    config = CASES["motor-ce"].config(epochs=1)
    motor = replace(config.motor, content=("text",), quantizer=quantizer, num_levels=2, num_codes=10)
    caplog.set_level("INFO")
    collab = train_collab(replace(config, motor=motor), data, content)
    collab.save(tmp_path)
    codes = load_provider(CollabEmbeddings.load(tmp_path)).items.codes
    assert torch.equal(codes, load_provider(collab).items.codes)
    found = [tuple(own) for own in codes[1:].tolist()]
    alike = sum(found.count(own) > 1 for own in found)
    assert f"{alike} of 40 items share all their codes with others" in caplog.text
    if quantizer == "residual":  # the first level sees the whole vector
        assert len(set(zip(codes[1:, 0].tolist(), look[1:]))) == 10


def test_items_of_equal_codes_have_equal_scores():
    model = Motor(num_items=20, **CASES["motor-ce"].config().of_model).eval()
    model.items.codes[7] = model.items.codes[5]
    with torch.no_grad():
        scores = model.score(torch.tensor([[3, 1]]))[0].numpy()
    assert scores[7] == scores[5] and len(np.unique(scores[1:])) == 19
