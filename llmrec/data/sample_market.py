"""The sample market: a small world, drawn by us, in which the best possible ranking is known.

Every item belongs to one interest (its noun) and has a colour; titles and pictures show both. A user
has a set S of 2, 3 or 4 interests. At each step the user stays in the current interest or moves to
another of S, and takes an item of it that is available and new to the user, by popularity, preferring
the colour of the item before. Cold items become available only in the launch week, the time of
everybody's last interaction, so that they have no train or valid interactions.

A history shows which interests were visited and when they changed; only the rest of S is hidden. The
distribution of the next item given the history alone is therefore exact (`next_interest`), and no
model that sees histories can rank better on average.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import comb

import numpy as np
import pyarrow as pa

from llmrec.data import splits, ties
from llmrec.data.config import SampleMarketConfig
from llmrec.data.sample_pictures import COLOURS, NOUNS, PATTERNS, SIZES, draw
from llmrec.data.summary import future_rate, leaking_user_rate, summarise, warnings_of
from llmrec.interactions import Interactions

NUM_INTERESTS = (2, 3, 4)
"""Interests of a user, each number as likely."""
MIN_LENGTH = 5
OPENING = 1_704_067_200
"""Unix seconds at which the market opens."""
LAUNCH = OPENING + 365 * 86_400
"""Unix seconds at which cold items become available: the start of the last week."""
WEEK = 7 * 86_400


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items of the market; arrays are int64 (N + 1,) with a meaningless entry 0 unless said otherwise."""

    interest: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    """float64, popularity inside the interest; entry 0 is 0"""
    cold: np.ndarray
    """bool, available only in the launch week"""
    members: np.ndarray
    """Items of each interest, filled up with 0, (G, most items of an interest)"""

    def __len__(self) -> int:
        return len(self.interest) - 1


def sample_market(config: SampleMarketConfig, seed: int) -> Interactions:
    """Draw the world: users, items with titles and pictures, interactions, true probabilities."""
    rng = np.random.default_rng(seed)
    catalogue = draw_catalogue(config, rng)
    length = rng.integers(MIN_LENGTH, config.max_length + 1, config.num_users)
    sequences = draw_sequences(config, catalogue, length, rng)
    offset = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    item = sequences[np.arange(config.max_length) < length[:, None]]
    split = splits.leave_one_out(offset)
    timestamp = draw_times(length, rng)
    scores = true_scores(config, catalogue, sequences, length - 1)
    train_count = np.bincount(item[split == splits.TRAIN], minlength=len(catalogue) + 1)[1:]
    items, images = describe_items(catalogue, rng)
    summary = {
        "source": "sample_market",
        "split": "leave_one_out",
        "ties": {"order": "file"} | ties.measure(offset, timestamp, item),
        "train_after_test_rate": future_rate(timestamp, split),
        "leaking_user_rate": leaking_user_rate(timestamp, split),
        **summarise(offset, split, train_count),
        "market": {
            "best_reachable": best_reachable(scores),
            "num_cold_items": int(catalogue.cold.sum()),
            "cold_test_rate": float(catalogue.cold[item[offset[1:] - 1]].mean()),
        },
    }
    summary["warnings"] = warnings_of(summary)
    return Interactions(
        user_raw_ids=_names("U", config.num_users),
        items=items.append_column("train_count", [train_count]),
        offset=offset,
        item=item,
        timestamp=timestamp,
        split=split,
        summary=summary,
        images=images,
        true_scores=scores.astype(np.float32),
    )


def draw_catalogue(config: SampleMarketConfig, rng: np.random.Generator) -> Catalogue:
    """Items in a random order of ids, so that an id says nothing about its item."""
    num_interests, num_items = config.num_interests, config.num_items
    looks = np.array(list(itertools.product(range(len(COLOURS)), range(len(PATTERNS)), range(len(SIZES)))))
    interest = np.zeros(num_items + 1, dtype=np.int64)
    interest[1:] = rng.permutation(np.arange(num_items) % num_interests)
    look = np.zeros((num_items + 1, 3), dtype=np.int64)
    weight = np.zeros(num_items + 1)
    cold = np.zeros(num_items + 1, dtype=bool)
    size = -(-num_items // num_interests)
    members = np.zeros((num_interests, size), dtype=np.int64)
    for number in range(num_interests):
        inside = np.flatnonzero(interest[1:] == number) + 1
        members[number, : len(inside)] = inside
        look[inside] = looks[rng.permutation(len(looks))[: len(inside)]]
        weight[inside] = rng.permutation(np.arange(1, len(inside) + 1) ** -config.popularity_exponent)
        num_cold = len(range(number, config.num_cold, num_interests))
        cold[inside[rng.permutation(len(inside))[:num_cold]]] = True
    return Catalogue(
        interest=interest,
        colour=look[:, 0],
        pattern=look[:, 1],
        size=look[:, 2],
        weight=weight,
        cold=cold,
        members=members,
    )


def draw_sequences(
    config: SampleMarketConfig, catalogue: Catalogue, length: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Items of every user, oldest first, filled up with 0: int64 (U, max_length)."""
    num_users = len(length)
    chosen = rng.choice(NUM_INTERESTS, num_users)
    interests = rng.random((num_users, config.num_interests)).argsort(axis=1)[:, : max(NUM_INTERESTS)]
    slot = rng.integers(0, chosen)
    sequences = np.zeros((num_users, config.max_length), dtype=np.int64)
    seen = np.zeros((num_users, len(catalogue) + 1), dtype=bool)
    previous = np.zeros(num_users, dtype=np.int64)
    everyone = np.arange(num_users)
    for step in range(config.max_length):
        if step:
            moves = rng.random(num_users) >= config.stay_rate
            slot = np.where(moves, (slot + rng.integers(1, chosen)) % chosen, slot)
        candidates = catalogue.members[interests[everyone, slot]]
        weight = affinity(config, catalogue, candidates, previous) * ~seen[everyone[:, None], candidates]
        is_last = step == length - 1
        weight[catalogue.cold[candidates] & ~np.asarray(is_last)[:, None]] = 0
        bound = np.cumsum(weight, axis=1)
        place = (bound <= rng.random((num_users, 1)) * bound[:, -1:]).sum(axis=1)
        previous = candidates[everyone, place]
        seen[everyone, previous] = True
        sequences[:, step] = np.where(step < length, previous, 0)
    return sequences


def affinity(
    config: SampleMarketConfig, catalogue: Catalogue, candidates: np.ndarray, previous: np.ndarray
) -> np.ndarray:
    """Weights of candidate items (U, C) after the previous item (U,); 0 there means no item yet."""
    same = (catalogue.colour[candidates] == catalogue.colour[previous][:, None]) & (previous[:, None] > 0)
    return catalogue.weight[candidates] * (1 + config.colour_affinity * same)


def draw_times(length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unix seconds of all interactions, user by user; each user's are distinct, the last in the last week."""
    step = np.arange(length.max())
    moment = rng.random((len(length), len(step)))
    moment = np.sort(np.where(step < length[:, None] - 1, moment, 1), axis=1)
    times = OPENING + (moment * (LAUNCH - OPENING - len(step))).astype(np.int64) + step
    times[np.arange(len(length)), length - 1] = LAUNCH + rng.integers(0, WEEK, len(length))
    return times[step < length[:, None]]


def true_scores(
    config: SampleMarketConfig, catalogue: Catalogue, sequences: np.ndarray, history: np.ndarray
) -> np.ndarray:
    """Exact probabilities of the item after a history, in the launch week; float64 (U, N + 1).

    Args:
        config: the market's settings.
        catalogue: its items.
        sequences: int64 (U, max_length).
        history: how many items of each sequence are known, int64 (U,), at least 1.
    """
    everyone = np.arange(len(sequences))
    known = np.arange(sequences.shape[1]) < history[:, None]
    interest = catalogue.interest[sequences]
    visited = np.zeros((len(sequences), config.num_interests), dtype=bool)
    visited[np.nonzero(known)[0], interest[known]] = True
    switches = ((interest[:, 1:] != interest[:, :-1]) & known[:, 1:]).sum(axis=1)
    last = sequences[everyone, history - 1]
    next_one = next_interest(visited, catalogue.interest[last], switches, config.stay_rate)
    every_item = np.broadcast_to(np.arange(len(catalogue) + 1), (len(sequences), len(catalogue) + 1))
    weight = affinity(config, catalogue, every_item, last)
    weight[np.nonzero(known)[0], sequences[known]] = 0
    belongs = np.eye(config.num_interests)[catalogue.interest]
    belongs[0] = 0
    return weight * (next_one / (weight @ belongs))[:, catalogue.interest]


def next_interest(
    visited: np.ndarray, current: np.ndarray, switches: np.ndarray, stay_rate: float
) -> np.ndarray:
    """Probability of every interest at the next step, given the interests so far; float64 (U, G).

    With |S| = m and v interests visited, a history with k switches has likelihood proportional to
    (1 / m) (m - 1)^-k for every S that holds the visited ones, and C(G - v, m - v) of the C(G, m) sets
    do. Given m, each visited interest but the current one is next with probability
    (1 - stay) / (m - 1), and each other interest lies in S with probability (m - v) / (G - v).

    Args:
        visited: bool (U, G).
        current: the last interest, int64 (U,).
        switches: k, how often the interest changed, int64 (U,).
        stay_rate: probability of staying.
    """
    num_users, num_interests = visited.shape
    num_visited = visited.sum(axis=1)
    posterior = np.zeros((num_users, len(NUM_INTERESTS)))
    for place, size in enumerate(NUM_INTERESTS):
        sets = np.array(
            [comb(num_interests - v, size - v) if v <= size else 0 for v in range(max(NUM_INTERESTS) + 1)]
        )
        # The number of switches is small, so the powers do not underflow.
        likelihood = (size - 1.0) ** -switches / size
        posterior[:, place] = sets[num_visited] / comb(num_interests, size) * likelihood
    posterior /= posterior.sum(axis=1, keepdims=True)
    sizes = np.array(NUM_INTERESTS)
    back = posterior @ ((1 - stay_rate) / (sizes - 1))
    unseen = np.maximum(sizes - num_visited[:, None], 0) / np.maximum(num_interests - num_visited, 1)[:, None]
    forth = (posterior * unseen) @ ((1 - stay_rate) / (sizes - 1))
    probability = np.where(visited, back[:, None], forth[:, None])
    probability[np.arange(num_users), current] = stay_rate
    return probability


def best_reachable(scores: np.ndarray) -> dict[str, float]:
    """Expected recall and nDCG of ranking by the true probabilities, the best any model can do."""
    top = -np.sort(-scores, axis=1)[:, :20]
    discount = 1 / np.log2(np.arange(2, 22))
    found = {}
    for k in (5, 10, 20):
        found[f"recall@{k}"] = float(top[:, :k].sum(axis=1).mean())
        found[f"ndcg@{k}"] = float((top[:, :k] @ discount[:k]).mean())
    return found


def describe_items(catalogue: Catalogue, rng: np.random.Generator) -> tuple[pa.Table, dict[str, bytes]]:
    """Titles and pictures: a table (raw_id, title, image_path), and PNG files by image_path."""
    raw_ids = _names("P", len(catalogue))
    angles = rng.uniform(-12, 12, len(catalogue) + 1)
    titles, images = [], {}
    for item, raw_id in enumerate(raw_ids, start=1):
        noun = NOUNS[catalogue.interest[item]]
        colour = list(COLOURS)[catalogue.colour[item]]
        pattern = PATTERNS[catalogue.pattern[item]]
        size = list(SIZES)[catalogue.size[item]]
        titles.append(" ".join(word for word in (size, pattern, colour, noun) if word).capitalize())
        images[f"images/{raw_id}.png"] = draw(noun, colour, pattern, SIZES[size], angles[item])
    return pa.table({"raw_id": raw_ids, "title": titles, "image_path": list(images)}), images


def _names(letter: str, count: int) -> list[str]:
    """Raw ids of one width, so that their order as text is their order as numbers."""
    width = len(str(count))
    return [f"{letter}{number:0{width}d}" for number in range(1, count + 1)]
