"""What will keep a recipe from finishing, looked for before anything starts: files, models, templates, and
settings of one stage that cannot work with those of another."""

from __future__ import annotations

import importlib.util
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmrec.data.config import PrepareDataConfig
from llmrec.errors import ConfigError, DataError
from llmrec.files import read_json
from llmrec.findings import Finding
from llmrec.finetune.config import FinetuneConfig
from llmrec.finetune.method_table import method_of
from llmrec.needed_models import hidden_size, models, tokenizer_folder
from llmrec.own import check_takes, is_own
from llmrec.recipe import Recipe
from llmrec.stages import STAGES


def in_the_way(recipe: Recipe, stages: Iterable[str] = tuple(STAGES)) -> Iterator[Finding]:
    """What stages need, and whether it is there; loads nothing, and takes seconds at most, to ask
    the Hub for models that are not here.

    Args:
        recipe: the settings.
        stages: those that are still to be computed.
    """
    stages = set(stages)
    yield from data_files(recipe, stages)
    yield from models(recipe, stages)
    if "encode_items" in stages:
        yield from contents(recipe)
    yield from own_classes(recipe, stages)
    ids = recipe.learn_semantic_ids
    asking = [("init=kmeans_constrained", "init=kmeans")] * (ids.init == "kmeans_constrained")
    asking += [(f"diversity_weight={ids.diversity_weight}", "diversity_weight=0")] * (
        ids.diversity_weight > 0
    )
    if "learn_semantic_ids" in stages and not importlib.util.find_spec("k_means_constrained"):
        for asks, without in asking:
            yield Finding(
                "problem",
                f"learn_semantic_ids.{asks}: its library is not installed",
                f"run `pip install 'llmrec[constrained]'`, or set learn_semantic_ids.{without}",
            )
    yield from widths_of_codes(recipe, stages)
    if "finetune" in stages:
        yield from fine_tuning(recipe)
    yield from modalities(recipe, stages)
    yield from masking(recipe, stages)


def masking(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Whether epochs are chosen by the same items as are ranked in the end."""
    masked = str(recipe.evaluate.mask_seen).lower()
    chosen: dict[str, Any] = {"finetune": recipe.finetune}
    if recipe.train_collab.provider != "precomputed":
        chosen["train_collab"] = recipe.train_collab
    other = [
        f"{name}.mask_seen={masked}"
        for name, stage in chosen.items()
        if name in stages and stage.select == "valid" and stage.mask_seen != recipe.evaluate.mask_seen
    ]
    if other:
        what = f"evaluate.mask_seen={masked}, but epochs are chosen by a ranking that differs in this"
        yield Finding("note", what, f"set {' '.join(other)}")


def widths_of_codes(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Numbers and widths of codes that another stage or another run decides."""
    ids, collab = recipe.learn_semantic_ids, recipe.train_collab
    model = None if collab.is_own else getattr(collab, collab.provider, None)
    width = getattr(model, "embed_dim", ids.code_dim)
    if "learn_semantic_ids" in stages and ids.collaborative_weight and ids.code_dim != width:
        yield Finding(
            "problem",
            f"learn_semantic_ids.code_dim={ids.code_dim} differs from train_collab.{collab.provider}."
            f"embed_dim={width}, and learn_semantic_ids.collaborative_weight compares these",
            "make them equal, or set learn_semantic_ids.collaborative_weight=0",
        )
    if "train_collab" not in stages or collab.semantic_ids is None:
        return
    file = Path(collab.source_files()["semantic_ids"])
    made = read_json(file).get("model", {}).get("quantizer", {}) if file.is_file() else {}
    for setting in ("num_levels", "num_codes"):
        wanted, got = made.get(setting), getattr(model, setting)
        if wanted not in (None, got):
            yield Finding(
                "problem",
                f"train_collab.{collab.provider}.{setting}={got}, and train_collab.semantic_ids="
                f"{collab.semantic_ids} has {wanted}",
                f"set train_collab.{collab.provider}.{setting}={wanted}",
            )


def data_files(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Files that the settings name."""
    for stage in ("prepare_data", "train_collab", "encode_items"):
        if stage not in stages:
            continue
        config = getattr(recipe, stage)
        named = {path.name for path in recipe.prepare_data.named_files()}
        for name, path in config.source_files().items():
            if name in named:
                continue
            where = f"{stage}.{name}={path}"
            if path.startswith("hub:") or Path(path).is_file():
                yield Finding("ok", where)
            else:
                what = "is a folder" if Path(path).is_dir() else "no such file"
                setting = name.partition(" ")[0]  # of the files of a folder, that of the folder
                yield Finding("problem", f"{where}: {what}", f"put it there, or set {stage}.{setting}")
    prepare = recipe.prepare_data
    if "prepare_data" in stages:
        yield from columns_of_tables(prepare)
        for path in prepare.named_files():
            if path.is_file():
                yield Finding("ok", str(path))
            elif prepare.offline:
                advice = "put it there, or set prepare_data.offline=false"
                yield Finding("problem", f"{path} is absent, and prepare_data.offline=true", advice)


def columns_of_tables(config: PrepareDataConfig) -> Iterator[Finding]:
    """Whether tables have the columns that they will be asked for, by their heads."""
    from llmrec.data.table_file import TableFile

    if config.source != "table":
        return
    asked = {
        "interactions": (
            *(config.user_column, config.item_column),
            *(config.timestamp_column, config.rating_column),
        ),
        "items": (
            *(config.items_item_column or config.item_column, config.title_column),
            *(*config.text_columns, config.image_column, config.image_url_column),
        ),
    }
    for name, columns in asked.items():
        path = getattr(config, name)
        if path is None or not Path(path).is_file():
            continue
        table = TableFile(Path(path), config.column_names if name == "interactions" else None)
        try:
            table.check([column for column in columns if column is not None])
        except DataError as error:
            yield Finding("problem", str(error), f"mend it, or set prepare_data.{name}")


def to_fetch(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Files of data that are absent and would be fetched, and the hosts that may have them."""
    prepare = recipe.prepare_data
    if prepare.source != "amazon_2014" or prepare.offline:
        return [], []
    from llmrec.data.named import AMAZON_2014

    addresses = [*prepare.mirrors, f"https://{AMAZON_2014}"]
    hosts = [urllib.parse.urlsplit(address).hostname or address for address in addresses]
    absent = [path.name for path in prepare.named_files() if not path.is_file()]
    return absent, list(dict.fromkeys(hosts))


def own_classes(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Whether models and methods of the user's own can be imported, which takes torch and what they need, and
    take the settings that they are given."""
    try:
        if "train_collab" in stages and recipe.train_collab.is_own:
            from llmrec.collab.provider import provider_class

            kind = provider_class(recipe.train_collab.provider)
            own = {"num_items": 1, **recipe.train_collab.own}
            check_takes(kind, recipe.train_collab.provider, "train_collab.own", **own)
        if "finetune" in stages and is_own(recipe.finetune.method):
            from llmrec.finetune.methods import tokens_class

            kind = tokens_class(recipe.finetune.method)
            check_takes(kind, recipe.finetune.method, "finetune.own", None, **recipe.finetune.own)
    except ConfigError as error:
        what, _, advice = str(error).partition("; ")
        yield Finding("problem", what, advice)


def contents(recipe: Recipe) -> Iterator[Finding]:
    """Whether the items will have the texts and pictures that encoders are told to read."""
    data, encode = recipe.prepare_data, recipe.encode_items
    if data.source == "sample_market":
        return
    named = "image_folder" if data.source == "amazon_2014" else "image_column"
    reads_pictures = encode.image.encoder not in ("none", "precomputed")
    if reads_pictures and getattr(data, named) is None and data.image_url_column is None:
        yield Finding(
            "problem",
            f"encode_items.image.encoder={encode.image.encoder} finds no pictures",
            f"set prepare_data.{named}, or encode_items.image.encoder=none",
        )
    if encode.text.encoder in ("none", "precomputed") or data.source == "amazon_2014":
        return
    there: list[str] = []
    if data.items is not None:
        there = [*(["title"] if data.title_column else []), *data.text_columns]
    if not there:
        yield Finding(
            "problem",
            f"encode_items.text.encoder={encode.text.encoder} finds no texts",
            "name an items file with prepare_data.title_column or prepare_data.text_columns, or set "
            "encode_items.text.encoder=none",
        )
    asked = encode.text.columns or re.findall(r"\{([^{}]+)\}", encode.text.template or "")
    if there and (unknown := [name for name in asked if name not in there]):
        yield Finding(
            "problem",
            f"encode_items.text asks for the columns {', '.join(asked)}: {', '.join(unknown)} will not be "
            f"there, but {', '.join(there)}",
            f"add prepare_data.text_columns={','.join((*data.text_columns, *unknown))}",
        )


def fine_tuning(recipe: Recipe) -> Iterator[Finding]:
    """The template, what needs a GPU, and widths that must agree."""
    config = recipe.finetune
    yield template(config)
    needs_gpu = [
        f"finetune.{name}={value}"
        for name, value in (("attention", "flex"), ("kernels", "liger"))
        if getattr(config, name) == value
    ]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            yield Finding("problem", f"{', '.join(needs_gpu)}: there is no CUDA device", "leave it out")
    if config.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        yield Finding("problem", "finetune.kernels=liger: not installed", "run `pip install 'llmrec[gpu]'`")
    ids = recipe.learn_semantic_ids
    reads_codes = method_of(config.method).reads_codes and not config.project_codes
    # Residual k-means makes codes of the vectors' own width.
    width = hidden_size(config) if reads_codes and ids.method != "rkmeans" else None
    if width is not None and ids.code_dim != width:
        of = "finetune.mini.hidden_size=" if config.is_mini else f"the width of {config.base_model}, "
        yield Finding(
            "problem",
            f"learn_semantic_ids.code_dim={ids.code_dim} differs from {of}{width}",
            "make them equal, or set finetune.project_codes=true",
        )
    if recipe.train_collab.include_valid and config.eval_every_epochs:
        yield Finding(
            "problem",
            "train_collab.include_valid=true makes the collaborative vectors from validation items, so these "
            "can measure nothing in finetune",
            "set finetune.eval_every_epochs=0 and finetune.select=last, or leave it out",
        )


def template(config: FinetuneConfig) -> Finding:
    """Whether the template can be read, and its markers are tokens of the base model, if that has a tokenizer
    and it is on this machine; loads no more than that."""
    from llmrec.finetune.prompt import read_template

    try:
        read_template(config.prompt)
    except ConfigError as error:
        return Finding("problem", str(error), "set finetune.prompt")
    folder = tokenizer_folder(config)
    problem = None if folder is None else in_tokens_of(config, folder)
    return problem or Finding("ok", f"finetune.prompt={config.prompt}")


def in_tokens_of(config: FinetuneConfig, folder: Path) -> Finding | None:
    """What is wrong with the template in the tokens of the base model, or with these, if anything.

    Args:
        config: settings.
        folder: with the tokenizer.
    """
    from transformers import AutoTokenizer

    from llmrec.finetune.base_model import NOT_LOADABLE
    from llmrec.finetune.prompt import tokenize

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*NOT_LOADABLE, KeyError, TypeError) as error:
        if not Path(config.base_model).is_dir():
            return None  # files that the cache lacks are fetched by the run
        said = f"the tokenizer of finetune.base_model={config.base_model} cannot be loaded: {error!r:.100}"
        return Finding("problem", said, "give a complete model")
    try:
        tokenize(config.prompt, tokenizer)
    except ConfigError as error:
        what, _, advice = str(error).partition("; ")
        return Finding("problem", what.replace("this base model", config.base_model), advice)
    return None


def modalities(recipe: Recipe, stages: set[str]) -> Iterator[Finding]:
    """Whether there will be the vectors that stages ask for."""
    from llmrec.finetune.modalities import modalities_of

    encode, ids = recipe.encode_items, recipe.learn_semantic_ids
    made = [name for name in ("text", "image") if getattr(encode, name).encoder != "none"]
    model = recipe.train_collab.provider
    asked = {
        f"train_collab.{model}.content": ("train_collab", recipe.train_collab.content, made),
        "learn_semantic_ids.modalities": ("learn_semantic_ids", ids.modalities or (), ["collab", *made]),
    }
    for setting, (stage, names, there) in asked.items():
        absent = [name for name in names if name not in there]
        if stage in stages and absent:
            advice = " and ".join(f"set encode_items.{name}.encoder" for name in absent)
            what = f"{setting}={','.join(names)}: there will be no {' and no '.join(absent)} vectors"
            yield Finding("problem", what, f"{advice}, or leave it out")
    if "finetune" in stages:
        try:
            modalities_of(recipe.finetune, ids.modalities or ("collab", *made))
        except ConfigError as error:
            yield Finding("problem", str(error), "set finetune.method, or what encode_items encodes")
