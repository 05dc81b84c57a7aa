"""What is tried on a target: good content with changes, and values that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rng = np.random.Generator
TOKENS = "nan inf -1 1e999 0 null true ../ __import__('os') {history} %s :: , ' \" { } [ ] \t \r \n é \u202e"
SETTINGS = "0 -1 1 2 7 1e-3 -0.5 nan inf -inf 1e400 true none None a é a,b 1,2 , {} [] ../x null = valid mini"
PIECES = (
    *(token.encode() for token in TOKENS.split(" ")),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"9" * 30, b" "),
)
VALUES = (*SETTINGS.split(" "), "", " ", "9" * 25)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that takes what people or files give."""

    name: str
    case: Callable[[Change], Any]
    """Runs one case; returns, or raises what is to be judged."""


class Change:
    """The change of one case; number 0 changes nothing, so that a target that refuses all is found out."""

    def __init__(self, seed: int, target: int, number: int) -> None:
        self.rng = np.random.default_rng((seed, target, number))
        self.nothing = number == 0

    def __call__(self, content: bytes) -> bytes:
        return content if self.nothing else mutated(content, self.rng)


def mutated(content: bytes, rng: Rng) -> bytes:
    """The content with one to four changes."""
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, len(content) + 1))
        other = int(rng.integers(0, len(content) + 1))
        size = int(rng.integers(1, 20))
        match rng.integers(0, 7):
            case 0 if place < len(content):
                content = (
                    content[:place]
                    + bytes([content[place] ^ (1 << rng.integers(0, 8))])
                    + content[place + 1 :]
                )
            case 1:
                content = content[:place] + content[place + size :]
            case 2:
                content = content[:place] + content[other : other + size] + content[place:]
            case 3:
                content = content[:place] + PIECES[rng.integers(0, len(PIECES))] + content[place:]
            case 4:
                content = content[:place] + rng.bytes(size) + content[place + size :]
            case 5:
                content = content[: max(place, len(content) // 2)]
            case _:
                lines = content.split(b"\n")
                first, second = rng.integers(0, len(lines), 2)
                lines[first], lines[second] = lines[second], lines[first]
                content = b"\n".join(lines)
    return content


def anything(rng: Rng, names: list[str], depth: int = 0) -> Any:
    """A JSON value that may or may not make sense."""
    match rng.integers(0, 9 if depth < 3 else 7):
        case 0 | 1:
            return names[rng.integers(0, len(names))]
        case 2:
            return VALUES[rng.integers(0, len(VALUES))]
        case 3:
            return int(rng.integers(-(2**62), 2**62)) if rng.random() < 0.3 else int(rng.integers(-2, 12))
        case 4:
            return float(rng.normal() * 10.0 ** rng.integers(-3, 300))
        case 5:
            return [None, True, False][rng.integers(0, 3)]
        case 6:
            return names[: rng.integers(0, 8)]
        case 7:
            return [anything(rng, names, depth + 1) for _ in range(rng.integers(0, 5))]
        case _:
            keys = ("history", "histories", "k", "candidates", "unknown", "explain", "model", "é")
            return {keys[rng.integers(0, len(keys))]: anything(rng, names, depth + 1) for _ in range(3)}
