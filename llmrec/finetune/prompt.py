"""Prompt templates: text around the slot where the item tokens go.

A template is a TOML file with `source` and `text`; the text holds ``{history}`` once (and ``{{`` for
a brace). What stands before the slot is the instruction (I tokens), what follows is the response
header (R tokens), whose last token is where the model is read out.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SLOT = "{history}"
WORD = re.compile(r"<\|\w+\|>|\w+|[^\w\s]")
MARKER = re.compile(r"<\|\w+\|>")
SPECIAL = re.compile(r"<\|?\w+\|?>")
"""What stands for one token in the chat format of any family, such as ``<bos>``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in token ids."""

    instruction: list[int]
    """I token ids before the item tokens"""
    response: list[int]
    """R >= 1 token ids after them"""
    vocab_size: int
    """Size of the vocabulary the ids come from."""


def read_template(name: str) -> tuple[str, str]:
    """The text before and after the history slot.

    Args:
        name: a file name in ``prompts/`` without its ending, or a path to a TOML file.

    Raises:
        ConfigError: no such template, or it lacks `text`, the slot, or anything after the slot.
    """
    path = _template_path(name)
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8")).get("text")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    if not isinstance(text, str) or text.count(SLOT) != 1:
        raise ConfigError(f"{path}: `text` must be a string that holds {SLOT} exactly once")
    before, after = (part.replace("{{", "{").replace("}}", "}") for part in text.split(SLOT))
    if not after.strip():
        raise ConfigError(f"{path}: something must follow {SLOT}; its last token is read out")
    return before, after


def tokenize(name: str, tokenizer: Any) -> Prompt:
    """The prompt in the ids of a Hugging Face tokenizer.

    The template spells out every special token, so none is added.

    Raises:
        ConfigError: if the template uses markers that the tokenizer does not know: ``<|any|>``, and in the
            shipped ones those of every family. (A template of one's own may have ``<b>`` as a text.)
    """
    before, after = read_template(name)
    for marker in (SPECIAL if name in shipped() else MARKER).findall(before + after):
        if not is_token(marker, tokenizer):
            raise ConfigError(
                f"finetune.prompt={name} uses {marker}, which is not a token of this base model; set "
                f"finetune.prompt to one that fits (of {', '.join(shipped())} these do: "
                f"{', '.join(fitting(tokenizer))}), or to the path of a template of your own in the base "
                "model's format"
            )
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    return Prompt(instruction=encode(before), response=encode(after), vocab_size=len(tokenizer))


def is_token(marker: str, tokenizer: Any) -> bool:
    """Whether a marker is one token, and not the one for all that is unknown."""
    ids = tokenizer(marker, add_special_tokens=False).input_ids
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def fitting(tokenizer: Any) -> list[str]:
    """Shipped templates whose markers are all tokens of a tokenizer."""
    return [
        name
        for name in shipped()
        if all(is_token(marker, tokenizer) for marker in SPECIAL.findall("".join(read_template(name))))
    ]


def tokenize_words(name: str) -> Prompt:
    """The prompt with one id per distinct word, for a base model that is trained from nothing."""
    before, after = (WORD.findall(part) for part in read_template(name))
    ids = {word: number for number, word in enumerate(dict.fromkeys(before + after))}
    return Prompt(
        instruction=[ids[word] for word in before],
        response=[ids[word] for word in after],
        vocab_size=len(ids),
    )


def _template_path(name: str) -> Path:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"finetune.prompt={name!r}: no such file")
        return path
    for folder in _folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise ConfigError(f"finetune.prompt={name!r} is unknown; known: {', '.join(shipped())}, or a .toml path")


def shipped() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.toml")})


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package.parent / "prompts", package / "prompts"]
