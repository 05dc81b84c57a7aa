"""A method from a package of the user's own: taken like any other, by name, everywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from packing_reference import EXACT, NUM_ITEMS, plain_prompts, random_users
from tiny_mme_sid import WIDTH, model
from tiny_recipe import tiny

from llmrec.cli import main as llmrec
from llmrec.errors import ConfigError
from llmrec.finetune.build import parameter_counts
from llmrec.finetune.packing import group_rows, pack
from llmrec.recipe import Recipe, main
from llmrec.runs import Run

SHARES = {"method": "own_methods:Shares", "own": {"scale": 2.0}}


def mine() -> Recipe:
    recipe = tiny()
    finetune = dataclasses.replace(recipe.finetune, **SHARES, fusion_temperature=1e-3)
    return dataclasses.replace(recipe, finetune=finetune)


def build(**settings):
    return model(NUM_ITEMS, **{"fusion_temperature": 1e-3, **SHARES, **settings})


def test_its_tokens_and_scores_are_what_it_says():
    net = build()
    tokens, items = net.item_tokens, torch.arange(1, NUM_ITEMS + 1)
    parts = torch.stack([part(items) for part in tokens.parts.values()])
    torch.testing.assert_close(tokens(items), parts.mean(dim=0))
    assert list(tokens.parts) == ["vectors_collab", "vectors_image", "vectors_text", "first_code"]
    assert net.item_scores.modalities == ()
    assert parameter_counts(net)["other_parts"] == 4 * WIDTH
    fused = build(fusion="sum").item_scores
    assert fused.modalities == ("collab", "image", "text")


@pytest.mark.parametrize("method", ["Shares", "Several"])
def test_packing_is_exact_for_it(method):
    net = build(method=f"own_methods:{method}", own={})
    item, targets = random_users([1, 3, 7])
    rows = pack(item, targets, group_rows(targets, "packed"))
    hidden = net.hidden(rows, net.item_tokens(torch.arange(NUM_ITEMS + 1)))
    torch.testing.assert_close(hidden, plain_prompts(net, item, targets), **EXACT)


def test_what_is_not_trained_may_be_made_again():
    build(method="own_methods:Seeded", own={})
    build(method="own_methods:Dropped", own={})


def test_checks_of_it_leave_the_random_numbers_alone():
    torch.manual_seed(5)
    build()
    first = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(first, torch.rand(3))


def test_a_loss_of_its_own_is_part_of_the_steps():
    assert not build().aligns
    assert build(method="own_methods:Pulled").aligns and build(method="own_methods:Pulled").alignment_weight


def test_the_whole_pipeline_and_its_tools_take_it(tmp_path, capsys):
    folder = str(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(mine, ["--run-dir", folder])
        assert left.value.code == 0, capsys.readouterr().err
    assert "own_methods:Shares" in capsys.readouterr().out
    run = Run(folder)
    assert run.recommender(device="cpu").score([run.data.raw_ids[:2]]).shape == (1, 96)
    with pytest.raises(SystemExit) as left:
        llmrec(["package", folder, "--out", str(tmp_path / "package")])
    assert not left.value.code
    with pytest.raises(SystemExit) as left:
        main(mine, ["--run-dir", folder, "--set", "finetune.own=scale=3.0"])
    assert left.value.code == 2 and "own.scale=2.0 (now 3.0)" in capsys.readouterr().err


def test_it_has_a_loss_of_its_own_through_a_whole_run(tmp_path, capsys):
    settings = ["finetune.method=own_methods:Pulled", "finetune.ctrl_weight=0.5"]
    with pytest.raises(SystemExit) as left:
        main(mine, ["--run-dir", str(tmp_path / "run"), "--until", "finetune", "--set", *settings])
    assert left.value.code == 0, capsys.readouterr().err


def test_it_is_a_row_of_a_comparison(tmp_path, capsys, monkeypatch):
    from llmrec.finetune import compare

    code = tmp_path / "methods_edited.py"
    shutil.copy(Path(__file__).parent / "own_methods.py", code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    arguments = ["--run-dir", str(tmp_path / "run"), "--seeds", "0", "--jobs", "1", "--rows", "e4srec"]
    arguments += ["--row", "shares", "method=methods_edited:Shares", "own=scale=0.5"]
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, arguments)
    assert left.value.code == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "shares" in out and "missing" not in out
    code.write_text(code.read_text() + "\n# edited\n")
    with pytest.raises(SystemExit) as left:
        compare.main(tiny, arguments)
    assert left.value.code == 2 and "was made with other code of method" in capsys.readouterr().err


def test_a_recipe_of_another_method_is_set_to_it_and_back(tmp_path, capsys):
    """Settings that went with the method that was there have no effect any more, and are left out."""
    before = ["--run-dir", str(tmp_path / "run"), "--until", "finetune", "--set", "finetune.epochs=1"]
    with pytest.raises(SystemExit) as left:
        main(tiny, [*before, "finetune.method=own_methods:Shares", "finetune.own=scale=0.5"])
    assert left.value.code == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "finetune" / "manifest.json").read_text())["config"]
    assert config["own"] == {"scale": 0.5}
    shutil.rmtree(tmp_path / "run" / "finetune")
    with pytest.raises(SystemExit) as left:
        main(mine, [*before, "finetune.method=e4srec"])
    assert left.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "far_away:Shares"}, r"finetune.method=far_away:Shares cannot be imported \(No module"),
        ({"method": "own_methods:function"}, "must be a class, got function"),
        ({"method": "own_methods:NoTokens"}, "must be a subclass of llmrec.finetune.item_inputs.ItemTokens"),
        (
            {"own": {"width": 3}},
            "finetune.own: own_methods:Shares does not take width; its constructor takes scale$",
        ),
        ({"method": "own_methods:Narrow", "own": {}}, "makes 3 x 8 numbers of 3 items, expected 3 x 16"),
        (
            {"method": "own_methods:Drawn", "own": {}},
            "noise is not trained, so it is not saved, and",
        ),
        (
            {"method": "own_methods:Frozen", "own": {}},
            "first_code.vectors_of.weight is not trained",
        ),
        (
            {"method": "own_methods:Idle", "own": {}},
            "later.weight, later.bias has no part in",
        ),
        (
            {"method": "own_methods:Averaged", "own": {}},
            "made again with the same trained weights it",
        ),
        (
            {"method": "own_methods:Shuffled", "own": {}},
            "made again with the same trained weights it",
        ),
        ({"method": "own_methods:Careless", "own": {}}, "tokens are other ones when they are made again"),
        ({"method": "own_methods:Misnamed", "own": {}}, "a ProjectedVectors must be called vectors_MODALITY"),
        ({"method": "own_methods:Several", "own": {"a": 1}}, "takes no settings$"),
        ({"method": "e4srec"}, "finetune.own has no effect with method='e4srec'"),
        ({"random_codes": True}, "finetune.random_codes has no effect with method='own_methods:Shares'"),
        ({"method": "own_methods"}, "finetune.method='own_methods': expected one of mme_sid"),
    ],
)
def test_what_is_no_method_is_said_to_be_none(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["finetune.method=own_methods:Shares", "finetune.own=scael=2"], "Shares does not take scael"),
        (["finetune.method=own_methods:Several", "finetune.own=a=2"], "Several does not take a"),
    ],
)
def test_settings_that_it_does_not_take_are_told_before_anything_is_computed(
    settings, said, tmp_path, capsys
):
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path), "--set", *settings])
    assert left.value.code == 2 and not (tmp_path / "prepare_data").exists()
    assert said in capsys.readouterr().err


def test_from_one_to_another_the_first_ones_settings_go(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(mine, ["--run-dir", str(tmp_path), "--dry-run", "--set", "finetune.method=own_methods:Several"])
    assert left.value.code == 0, capsys.readouterr().err


def test_a_method_that_is_not_there_is_told_before_anything_is_computed(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(tiny, ["--run-dir", str(tmp_path), "--set", "finetune.method=far_away:Shares"])
    assert left.value.code == 2 and not (tmp_path / "prepare_data").exists()
    assert "far_away:Shares cannot be imported" in capsys.readouterr().err
