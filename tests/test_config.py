"""Overrides are typed, unknown names are refused with the nearest one, help comes from the code."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, is_dataclass
from typing import Literal

import pytest

from llmrec import cli
from llmrec.assignments import describe, field_docs, format_value, override
from llmrec.cli import settings_help
from llmrec.collab.config import TrainCollabConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.config import (
    Settings,
    as_dict,
    changed_fields,
    changed_settings,
    flatten,
    from_dict,
    require,
    unhandled,
)
from llmrec.data.config import PrepareDataConfig
from llmrec.encoders.config import EncodeItemsConfig
from llmrec.errors import ConfigError
from llmrec.finetune.config import FinetuneConfig
from llmrec.recipe import Recipe, apply_overrides


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    """A group."""

    rate: float = 0.5
    """Share in [0, 1]."""

    sizes: tuple[int, ...] = (2, 3)
    """Widths, in units."""


@dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    """A stage."""

    count: int = 1
    """How many,
    in items."""

    limit: int | None = None
    """Most, in items; none: no limit."""

    kind: Literal["a", "b"] = "a"
    """Which one."""

    colours: tuple[Literal["red", "green", "blue"], ...] | None = None
    """Which ones; none: all."""

    on: bool = True
    """Whether."""

    path: str | None = None
    """Where."""

    names: tuple[str, ...] = ()
    """Columns."""

    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Whatever."""

    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        require(self.count >= 1, f"count must be >= 1, got {self.count}")
        require(self.kind == "a" or self.limit is not None, "kind=b needs limit")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("count", "7", 7),
        ("limit", "5", 5),
        ("limit", "none", None),
        ("on", "false", False),
        ("path", "none", None),
        ("path", "7", "7"),
        ("inner.rate", "1e-3", 1e-3),
        ("inner.sizes", "4,5, 6", (4, 5, 6)),
        ("inner.sizes", "4", (4,)),
        ("inner.sizes", "none", ()),
        ("inner.sizes", "", ()),
        ("inner.sizes", "[4, 5]", (4, 5)),
        ("inner.sizes", "[]", ()),
        ("names", "a, b", ("a", "b")),
        ("names", '["a, b", "c"]', ("a, b", "c")),
        ("options", "a=1, b=x", {"a": 1, "b": "x"}),
        ("options", '{"a": "1, b=2", "c": true}', {"a": "1, b=2", "c": True}),
        ("colours", "none", None),
    ],
)
def test_text_becomes_a_value_of_the_annotated_type(path, text, value):
    leaves = dict(flatten(override(Outer(), {path: text})))
    assert leaves[path] == value and type(leaves[path]) is type(value)


@pytest.mark.parametrize(
    "value", [(), ("a",), ("a", "b"), ("a,b", "c"), (" a",), ("",), ('["a"]',), ("None", "[", 'é,"')]
)
def test_entries_are_printed_as_they_are_typed(value):
    config = Outer(names=value, options={part: part for part in value} | {"x": 1e-3, "y": "true"})
    texts = {path: format_value(leaf) for path, leaf in flatten(config)}
    assert override(Outer(), texts) == config


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("coutn", "1", "unknown setting 'coutn'; did you mean count?"),
        ("inner.rat", "1", "unknown setting 'inner.rat'; did you mean inner.rate?"),
        ("zzz", "1", "known: count, limit, kind, colours, on, path, names, options, inner"),
        ("count", "two", "count='two': expected a whole number"),
        ("count", "1.5", "count='1.5': expected a whole number"),
        ("limit", "five", "limit='five': expected none, or a whole number"),
        ("count", "0", "count must be >= 1, got 0"),
        ("kind", "c", "kind='c': expected one of a, b"),
        ("colours", "red, gren", "each one of red, green, blue; did you mean green?"),
        ("on", "maybe", "on='maybe': expected true or false"),
        ("inner", "1", "'inner' is a group; set one of its fields: rate, sizes"),
        ("count.x", "1", "'count' is a single value"),
        ("inner.sizes", "1,x", "sizes='1,x': expected entries separated by commas, each a whole number"),
        ("inner.rate", "half", "inner.rate='half': expected a (finite) number"),
    ],
)
def test_bad_overrides_say_what_is_wrong(path, text, words):
    with pytest.raises(ConfigError) as caught:
        override(Outer(), {path: text})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_choice_is_listed_once_with_the_nearest_and_no_word_of_a_library():
    from llmrec.collab.config import TrainCollabConfig

    with pytest.raises(ConfigError) as caught:
        override(TrainCollabConfig(), {"provider": "sasrek"})
    said = str(caught.value)
    assert said.startswith("provider='sasrek': expected one of ") and said.endswith("; did you mean sasrec?")
    assert said.count("gmvae") == 1 and "input" not in said


def test_fields_that_need_each_other_are_set_together_in_any_order():
    for order in (["kind", "limit"], ["limit", "kind"]):
        texts = {"kind": "b", "limit": "3"}
        assert override(Outer(), {name: texts[name] for name in order}).limit == 3


def test_a_config_survives_json():
    config = override(Outer(), {"inner.sizes": "7,8", "limit": "4"})
    assert from_dict(Outer, as_dict(config)) == config
    with pytest.raises(ConfigError, match="no field 'cuont'; did you mean count"):
        from_dict(Outer, {"cuont": 1})


def test_changes_are_named_with_both_values():
    before, after = as_dict(Outer()), as_dict(override(Outer(), {"inner.rate": "0.1", "count": "2"}))
    assert changed_fields(before, after) == ["count=1 (now 2)", "inner.rate=0.5 (now 0.1)"]
    assert changed_fields(before, before) == []


def test_help_is_the_string_below_each_field():
    assert field_docs(Outer)["count"] == "How many, in items."
    described = {path: (kind, default) for path, kind, default, _ in describe(Outer)}
    assert described["limit"] == ("int | none", "none")
    assert described["inner.sizes"] == ("int, ...", "2,3")


def test_a_default_that_help_shows_can_be_typed():
    from llmrec.recipe import Recipe

    for path, _, default, _ in describe(Recipe):
        assert override(Recipe(), {path: default}) == Recipe(), f"{path}={default}"


def test_a_setting_of_another_group_is_hinted_at():
    from llmrec.collab.config import TrainCollabConfig
    from llmrec.recipe import Recipe, apply_overrides

    for config, setting, words in (
        (Recipe(), "lora_rank=4", "unknown setting 'lora_rank'; did you mean finetune.lora_rank?"),
        (Recipe(), "epochs=4", "train_collab.epochs or learn_semantic_ids.epochs or finetune.epochs"),
        (Recipe(), "train_colab.epochs=4", "did you mean train_collab.epochs or"),
        (TrainCollabConfig(), "train_collab.epochs=4", "did you mean epochs?"),
        (Recipe(), "finetune.lora_rnk=4", "did you mean finetune.lora_rank?"),
        (TrainCollabConfig(), "embed_dim=4", "'embed_dim'; did you mean sasrec.embed_dim?"),
        (Recipe(), "train_collab.embed_dim=4", "did you mean train_collab.sasrec.embed_dim?"),
        (Recipe(), "nothing_like_it=4", "known: prepare_data, train_collab"),
    ):
        with pytest.raises(ConfigError) as caught:
            apply_overrides(config, [setting])
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"did you mean train_collab\.fuxi\.max_history\?"):
        apply_overrides(Recipe(), ["train_collab.max_history=9", "train_collab.provider=fuxi"])


def test_a_stage_takes_no_setting_of_another():
    from llmrec.arguments import own_rows, settings_of

    assert settings_of("train_collab", ["epochs=1", "train_collab.seed=2"]) == ["epochs=1", "seed=2"]
    said = "'finetune.epochs' is a setting of finetune; here stand those of train_collab alone"
    with pytest.raises(ConfigError, match=said):
        settings_of("train_collab", ["epochs=1", "finetune.epochs=2"])
    with pytest.raises(ConfigError, match=said):
        own_rows([["mine", "finetune.epochs=2"]], "train_collab", ())


def test_of_many_settings_a_few_are_named_or_the_command_that_lists_them():
    for setting, said in (
        ("finetune.lr", "'finetune.lr'; did you mean finetune.lora_rank or finetune.learning_rate?"),
        ("finetune.rank", "'finetune.rank'; did you mean finetune.lora_rank?"),
        ("finetune.zzz", "'finetune.zzz'; `llmrec finetune --help` lists those that there are"),
        ("finetune.vocab", "'finetune.vocab'; `llmrec finetune --help` lists those that there are"),
    ):
        with pytest.raises(ConfigError) as caught:
            override(Recipe(), {setting: "1"})
        assert said in str(caught.value) and len(str(caught.value)) < 120
    with pytest.raises(ConfigError, match=r"'lr'; did you mean lora_rank or learning_rate\?"):
        override(FinetuneConfig(), {"lr": "1"})
    with pytest.raises(ConfigError, match=r"no field 'zzz'; `llmrec finetune --help` lists"):
        from_dict(FinetuneConfig, {"zzz": 1})


def test_groups_that_come_with_a_choice_are_not_spelt_out():
    before = {"provider": "sasrec", "sasrec": {"width": 64, "layers": 2}}
    after = {"provider": "gru4rec", "gru4rec": {"width": 32}}
    assert changed_fields(before, after) == ['provider="sasrec" (now "gru4rec")']
    assert changed_fields({"a": {"b": 1}}, {}, "stage.") == ["other settings of stage.a"]
    assert changed_fields({}, {"a": {"b": 1}}) == ["no settings of a"]


CONFIGS = {type(config) for config in vars(Recipe()).values()} | {
    type(group)
    for config in vars(Recipe()).values()
    for group in vars(config).values()
    if is_dataclass(group)
}


@pytest.mark.parametrize("cls", sorted(CONFIGS, key=lambda cls: cls.__name__))
def test_no_config_takes_a_value_of_another_type_from_python_code_either(cls):
    for path, kind, _, _ in describe(cls):
        if "." in path:
            continue
        wrong = object() if kind.startswith("str") else "no such value"
        with pytest.raises(ConfigError, match=rf"^{cls.prefix}{path}=.*: expected "):
            cls(**{path: wrong})
    assert issubclass(cls, Settings) and cls.prefix


def test_a_choice_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"expected one of .*; did you mean mme_sid\?"):
        FinetuneConfig(method="mme_sidd")
    with pytest.raises(ConfigError, match=r"train_collab\.provider='sasrecc': .* did you mean sasrec\?"):
        TrainCollabConfig(provider="sasrecc")


def test_a_group_is_called_with_its_article():
    with pytest.raises(ConfigError, match="image='none': expected an ImageEncoderConfig"):
        EncodeItemsConfig(image="none")
    with pytest.raises(ConfigError, match="mini=3: expected a MiniConfig"):
        FinetuneConfig(mini=3)


def test_values_that_say_the_same_are_taken_as_from_a_command_line():
    config = FinetuneConfig(base_model="x/y", learning_rate="1e-3", lora_targets=["q_proj"], epochs=3.0)
    assert (config.learning_rate, config.lora_targets, config.epochs) == (1e-3, ("q_proj",), 3)
    assert from_dict(FinetuneConfig, as_dict(config)) == config
    with pytest.raises(ConfigError, match=r"finetune\.loss='cee'"):
        from_dict(FinetuneConfig, as_dict(config) | {"loss": "cee"})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite_also_from_python_code(value):
    with pytest.raises(ConfigError, match=r"clip_norm=.*: expected .*finite"):
        FinetuneConfig(clip_norm=value)


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default():
    before = as_dict(FinetuneConfig())
    del before["patience"], before["mini"]["num_layers"], before["lora_targets"]
    assert changed_settings(before, FinetuneConfig()) == []
    found = changed_settings(before, FinetuneConfig(select="valid", patience=3))
    assert found == ['select="last" (now "valid")', "patience=null (now 3)"]
    assert changed_settings(before | {"gone": 1}, FinetuneConfig()) == ["gone=1 (now null)"]


def test_settings_that_were_written_down_before_they_were_refused_are_still_read():
    """They had no effect, so a run that was made with them is the same as one without."""
    for config, idle in (
        (FinetuneConfig(loss="bce_sampled"), {"mask_pad": False}),
        (FinetuneConfig(targets="last_only"), {"max_targets": 5}),
    ):
        with pytest.raises(ConfigError, match="has no effect with"):
            dataclasses.replace(config, **idle)
        before = as_dict(config) | idle
        assert from_dict(FinetuneConfig, before) == config
        assert changed_settings(before, config) == []
        assert changed_settings(before | {"epochs": 17}, config) == ["epochs=17 (now 3)"]
    collab = TrainCollabConfig(provider="gmvae", gmvae=GmvaeConfig(prior="standard"))
    before = as_dict(collab)
    before["gmvae"]["temporal_from_epoch"] = 31
    assert from_dict(TrainCollabConfig, before) == collab and changed_settings(before, collab) == []


def test_paths_are_taken_as_text(tmp_path):
    made = PrepareDataConfig(source="table", interactions=tmp_path / "a.csv")
    assert made.interactions == str(tmp_path / "a.csv")


def test_help_lists_all_settings_or_those_with_a_word():
    everything = settings_help(TrainCollabConfig, None)
    assert everything.index("  epochs: ") < everything.index("  sasrec.embed_dim: "), "groups come last"
    assert len(re.findall(r"^  \S", everything, re.MULTILINE)) == len(list(describe(TrainCollabConfig)))
    some = settings_help(TrainCollabConfig, "GMVAE")
    names = re.findall(r"^  ([\w.]+):", some, re.MULTILINE)
    assert {name.partition(".")[0] for name in names} >= {"gmvae"} and not any("sasrec." in n for n in names)
    assert settings_help(TrainCollabConfig, "zzz").startswith("there are no settings with 'zzz'")
    with pytest.raises(SystemExit) as left:
        cli.parser().parse_args(["finetune", "--help", "fusion"])
    assert left.value.code == 0


def test_settings_of_ones_own_are_numbers_and_truths_as_json_or_python_write_them():
    """A text that says False would count as true in the constructor that gets it."""
    from llmrec.collab.config import TrainCollabConfig

    typed = "a=False,b=true,c=.5,d=1_000,e=1e-3,f=+2,g=mean,h='x',i=-3,j=,k=none"
    made = override(TrainCollabConfig(), {"provider": "mine:Model", "own": typed})
    values = {"a": False, "b": True, "c": 0.5, "d": 1000, "e": 1e-3, "f": 2, "g": "mean", "h": "x", "i": -3}
    assert made.own == {**values, "j": "", "k": "none"}
    for text in ("[" * 100_000, "-" * 100_000 + "1"):  # deeper than readers of JSON and Python go
        made_of = override(TrainCollabConfig(), {"provider": "mine:Model", "own": f"a={text}"}).own
        assert made_of == {"a": text}
    assert [type(made.own[name]) for name in "abcd"] == [bool, bool, float, int]
    for bad in ("a=None", "a=[1]", "a=NaN", "a=1j"):
        with pytest.raises(ConfigError, match="values must be numbers, texts, true or false"):
            override(TrainCollabConfig(), {"provider": "mine:Model", "own": bad})


def test_numbers_of_numpy_in_settings_of_ones_own_keep_their_kind():
    """Of a notebook's loop over np.array([16, 32])."""
    import numpy as np

    from llmrec.collab.config import TrainCollabConfig

    own = {"dim": np.array([16])[0], "rate": np.float32(0.5), "flag": np.bool_(True)}
    made = TrainCollabConfig(provider="mine:Model", own=own).own
    assert made == {"dim": 16, "rate": 0.5, "flag": True}
    assert [type(value) for value in made.values()] == [int, float, bool]
    for bad in ((1, 2), None, np.zeros(2)):
        with pytest.raises(ConfigError, match="expected names with values that are numbers, texts, true or"):
            TrainCollabConfig(provider="mine:Model", own={"x": bad})


@pytest.mark.parametrize("name", ["train_collab", "learn_semantic_ids", "finetune", "encode_items.text"])
def test_a_seed_that_numpy_does_not_take_is_refused_at_once(name):
    """Else the stage fails once it begins, hours after those before it did."""
    most = 2**32 - 1
    message = re.escape(f"{name}.seed must be at most {most}, got {most + 1}")
    apply_overrides(Recipe(), [f"{name}.seed={most}"])
    with pytest.raises(ConfigError, match=f"^{message}$"):
        apply_overrides(Recipe(), [f"{name}.seed={most + 1}"])


def test_a_choice_without_a_branch_does_not_pass_for_another():
    with pytest.raises(AssertionError, match="there is no branch for 'new'"):
        unhandled("new")
