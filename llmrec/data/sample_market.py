"""The sample market: a small seeded world whose true next-item probabilities are known.

Items belong to interests (a noun each) and have a colour, a pattern and a size; titles say so and
pictures show it. A user has a set S of 2 to 4 interests. Each step stays in the current interest with
probability `stay_rate`, else moves to another one of S, all equally likely; then an unseen item of that
interest is drawn in proportion to its popularity weight, items of the previous item's colour being
1 + `colour_affinity` times as likely. In the last week of the calendar, where every user's last
interaction falls, cold items are available for the first time.

Because an item has one interest, a history shows the interests visited; only S is hidden. All sets of
one size are equally likely a priori, so the exact prediction from the history alone has a closed form
(`next_interest`), and with it the best ranking any model can reach.
"""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from llmrec.artifacts import Interactions
from llmrec.data import splits
from llmrec.data.config import SampleMarketConfig

NOUNS = (
    "teapot", "kite", "lantern", "basket", "violin", "compass", "candle", "helmet", "umbrella", "mirror",
    "rug", "bell", "vase", "drum", "globe", "anchor", "clock", "ladder", "pillow", "saddle", "telescope",
    "marble", "wagon", "whistle",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
HUES = (0.0, 0.075, 0.145, 0.34, 0.47, 0.6, 0.76, 0.91)
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large", "giant")
NUM_INTERESTS_OF_A_USER = (2, 3, 4)
POPULARITY_EXPONENT = 0.9
MIN_LENGTH, MAX_LENGTH = 5, 24
CALENDAR_START = 1_700_000_000
WEEK = 7 * 24 * 3600
PICTURE = 64
# Outlines r(angle) of the superformula, one per interest: (symmetry, n1, n2, n3, height / width).
OUTLINES = (
    (3, 5, 18, 18, 1.0), (4, 30, 15, 15, 1.3), (5, 2, 7, 7, 1.0), (6, 1, 1, 6, 1.0), (2, 1, 1, 1, 0.7),
    (8, 60, 55, 100, 1.0), (1, 0.5, 0.5, 0.5, 1.4), (4, 100, 100, 100, 0.8), (5, 0.3, 1.7, 1.7, 1.0),
    (0, 1, 1, 1, 1.0), (4, 100, 100, 100, 0.4), (3, 4.5, 10, 10, 0.6), (7, 3, 6, 17, 1.0),
    (0, 1, 1, 1, 0.45), (2, 0.7, 0.3, 0.2, 1.0), (6, 0.4, 0.6, 0.8, 1.0), (12, 15, 20, 3, 1.0),
    (4, 0.5, 0.5, 4, 1.0), (4, 12, 15, 15, 0.6), (3, 0.6, 1.2, 1.2, 1.2), (1, 4, 10, 16, 0.8),
    (0, 1, 1, 1, 1.9), (16, 0.9, 0.7, 2.5, 1.0), (5, 6, 12, 12, 1.5),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Market:
    """The items and rules of a world; arrays are (N,), item i at place i - 1."""

    config: SampleMarketConfig
    interest: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    """Popularity inside the interest, > 0"""
    cold: np.ndarray
    """bool: available in the last week only"""

    @property
    def membership(self) -> np.ndarray:
        """float64 (N, G): 1 where the item belongs to the interest."""
        return (self.interest[:, None] == np.arange(self.config.num_interests)).astype(np.float64)

    @property
    def max_length(self) -> int:
        """Longest sequence that cannot run out of items in one interest."""
        ready = np.bincount(self.interest[~self.cold], minlength=self.config.num_interests)
        return int(min(MAX_LENGTH, ready.min()))


def make_market(config: SampleMarketConfig, rng: np.random.Generator) -> Market:
    """Draw the items."""
    number = np.arange(config.num_items)
    interest = number % config.num_interests
    rank = number // config.num_interests
    looks = np.empty((config.num_items, 3), dtype=np.int64)
    shape = (len(COLOURS), len(PATTERNS), len(SIZES))
    for group in range(config.num_interests):
        members = interest == group
        draw = rng.permutation(math.prod(shape) * (1 + members.sum() // math.prod(shape)))
        looks[members] = np.stack(np.unravel_index(draw[: members.sum()] % math.prod(shape), shape), 1)
    # Cold items stand anywhere in popularity, at most one in every few of an interest.
    cold = np.zeros(config.num_items, dtype=bool)
    cold[rng.permutation(config.num_items)[: round(config.cold_rate * config.num_items)]] = True
    return Market(
        config=config,
        interest=interest,
        colour=looks[:, 0],
        pattern=looks[:, 1],
        size=looks[:, 2],
        weight=(rank + 1.0) ** -POPULARITY_EXPONENT,
        cold=cold,
    )


def next_interest(
    visited: np.ndarray, current: np.ndarray, num_moves: np.ndarray, stay_rate: float
) -> np.ndarray:
    """Probability of each interest at the next step, given the history alone; float64 (U, G).

    With v interests visited in n moves, a set S of size m explains the history with probability
    C(G - v, m - v) / C(G, m) * 1 / m * (m - 1)^-n (choice of S, of the first interest, of each move);
    given m, every interest not visited yet is in S with probability (m - v) / (G - v).

    Args:
        visited: bool (U, G), interests in the history.
        current: int (U,), interest of the last item.
        num_moves: int (U,), changes of interest so far.
        stay_rate: probability of staying.
    """
    num_interests = visited.shape[1]
    count = visited.sum(axis=1)
    sizes = np.array(NUM_INTERESTS_OF_A_USER)
    likelihood = np.zeros((len(visited), len(sizes)))
    for column, size in enumerate(sizes):
        ways = np.array([math.comb(num_interests - v, size - v) if v <= size else 0 for v in count])
        likelihood[:, column] = (
            ways / math.comb(num_interests, size) / size * (size - 1.0) ** -num_moves.astype(np.float64)
        )
    posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    move = (1 - stay_rate) / (sizes - 1)
    inside = (posterior * move).sum(axis=1)
    unseen_share = np.maximum(sizes - count[:, None], 0) / np.maximum(num_interests - count, 1)[:, None]
    outside = (posterior * move * unseen_share).sum(axis=1)
    result = np.where(visited, inside[:, None], outside[:, None])
    result[np.arange(len(current)), current] = stay_rate
    return result


def item_given_interest(
    market: Market, seen: np.ndarray, previous: np.ndarray | None, *, last_week: bool
) -> np.ndarray:
    """Probability of each item given that its interest is next; float64 (U, N), sums to 1 by interest.

    Args:
        market: the world.
        seen: bool (U, N), items that cannot come again.
        previous: int (U,), place of the previous item; None at the first step.
        last_week: whether cold items are available.
    """
    weight = np.where(seen, 0.0, market.weight)
    if not last_week:
        weight[:, market.cold] = 0
    if previous is not None:
        same = market.colour[previous][:, None] == market.colour
        weight = weight * (1 + market.config.colour_affinity * same)
    member = market.membership
    return weight / np.maximum((weight @ member) @ member.T, 1e-300)


def draw_rows(probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column per row, drawn with the row's probabilities; int64 (U,)."""
    total = probability.cumsum(axis=1)
    return (total < rng.random(len(total))[:, None] * total[:, -1:]).sum(axis=1)


def draw_sequences(market: Market, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Item places of every user, oldest first, and the true probabilities of the last one (U, N)."""
    config = market.config
    users, everyone = config.num_users, np.arange(config.num_users)
    spread = market.max_length - MIN_LENGTH
    mean = min((config.mean_length - MIN_LENGTH) / max(spread, 1), 0.95)
    length = MIN_LENGTH + np.floor(rng.beta(0.9, 0.9 * (1 - mean) / mean, users) * (spread + 1)).astype(int)
    length = np.minimum(length, market.max_length)
    size = rng.choice(NUM_INTERESTS_OF_A_USER, users)
    order = rng.random((users, config.num_interests)).argsort(axis=1).argsort(axis=1)
    liked = order < size[:, None]

    seen = np.zeros((users, config.num_items), dtype=bool)
    visited = np.zeros((users, config.num_interests), dtype=bool)
    moves = np.zeros(users, dtype=np.int64)
    current = draw_rows(liked.astype(np.float64), rng)
    previous, chosen = None, np.zeros((users, market.max_length), dtype=np.int64)
    truth = np.zeros((users, config.num_items))
    for step in range(market.max_length):
        if step:
            others = liked.astype(np.float64)
            others[everyone, current] = 0
            leave = rng.random(users) >= config.stay_rate
            target = np.where(leave, draw_rows(others, rng), current)
        else:
            leave, target = np.zeros(users, dtype=bool), current
        early = item_given_interest(market, seen, previous, last_week=False)
        late = item_given_interest(market, seen, previous, last_week=True)
        is_last = length == step + 1
        if is_last.any():
            ahead = next_interest(visited[is_last], current[is_last], moves[is_last], config.stay_rate)
            truth[is_last] = late[is_last] * ahead[:, market.interest]
        moves += leave
        current = target
        inside = market.interest == current[:, None]
        previous = draw_rows(np.where(is_last[:, None], late, early) * inside, rng)
        chosen[:, step] = previous
        seen[everyone, previous] = True
        visited[everyone, current] = True
    return [row[:size] for row, size in zip(chosen, length)], truth


def draw_times(length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unix seconds, strictly increasing in each user; the last one falls in the last of 52 weeks."""
    times = []
    for size in length:
        before = np.sort(rng.integers(0, 51 * WEEK - size, size - 1)) + np.arange(size - 1)
        times += [before, [51 * WEEK + rng.integers(0, WEEK)]]
    return CALENDAR_START + np.concatenate(times).astype(np.int64)


def sample_market(config: SampleMarketConfig, seed: int) -> Interactions:
    """Draw the whole world, split leave-one-out, with its true probabilities at the test item."""
    rng = np.random.default_rng(seed)
    market = make_market(config, rng)
    sequences, truth = draw_sequences(market, rng)
    length = np.array([len(sequence) for sequence in sequences])
    offset = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    item = np.concatenate(sequences) + 1
    split = splits.leave_one_out(offset)
    count = np.bincount(item[split == splits.TRAIN], minlength=config.num_items + 1)[1:]
    names = [f"{NOUNS[group]}-{n // config.num_interests + 1:03d}" for n, group in enumerate(market.interest)]
    pictures = {f"images/{name}.png": draw_picture(market, n) for n, name in enumerate(names)}
    true_scores = np.zeros((config.num_users, config.num_items + 1), dtype=np.float32)
    true_scores[:, 1:] = truth
    return Interactions(
        user_raw_ids=[f"user-{number + 1:05d}" for number in range(config.num_users)],
        items=pa.table(
            {
                "raw_id": names,
                "title": [title_of(market, n) for n in range(config.num_items)],
                "image_path": pa.array(list(pictures), pa.string()),
                "train_count": count,
            }
        ),
        offset=offset,
        item=item,
        timestamp=draw_times(length, rng),
        split=split,
        summary=_summary(length, split, count, truth),
        images=pictures,
        true_scores=true_scores,
    )


def title_of(market: Market, place: int) -> str:
    """What a shop would call the item: size, colour, pattern, noun."""
    words = (
        SIZES[market.size[place]],
        COLOURS[market.colour[place]],
        PATTERNS[market.pattern[place]],
        NOUNS[market.interest[place]],
    )
    return " ".join(words).capitalize()


def draw_picture(market: Market, place: int) -> bytes:
    """A PNG of the item: the outline of its interest in its colour, pattern and size."""
    scale = 4  # drawn large and scaled down, for smooth edges
    side = PICTURE * scale
    hue = HUES[market.colour[place]]
    colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.9))
    darker = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.55))
    symmetry, n1, n2, n3, height = OUTLINES[market.interest[place]]
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    radius = (
        np.abs(np.cos(symmetry * angle / 4)) ** n2 + np.abs(np.sin(symmetry * angle / 4)) ** n3 + 1e-9
    ) ** (-1 / n1)
    x, y = radius * np.cos(angle), radius * np.sin(angle) * height
    reach = (0.28, 0.34, 0.4, 0.46)[market.size[place]] * side / max(np.abs(x).max(), np.abs(y).max())
    outline = list(zip((side / 2 + reach * x).tolist(), (side / 2 - reach * y).tolist()))

    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    fill = Image.new("RGB", (side, side), colour)
    _draw_pattern(ImageDraw.Draw(fill), PATTERNS[market.pattern[place]], side, darker)
    picture = Image.new("RGB", (side, side), (245, 243, 238))
    picture.paste(fill, mask=mask)
    ImageDraw.Draw(picture).line([*outline, outline[0]], fill=darker, width=scale * 2, joint="curve")
    buffer = io.BytesIO()
    picture.resize((PICTURE, PICTURE), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, side: int, colour: tuple[int, ...]) -> None:
    step = side // 8
    for row in range(0, side, step):
        if pattern == "striped":
            draw.rectangle((0, row, side, row + step // 3), fill=colour)
        for column in range(0, side, step):
            if pattern == "dotted":
                draw.ellipse((column, row, column + step // 2, row + step // 2), fill=colour)
            elif pattern == "checked" and (row + column) // step % 2:
                draw.rectangle((column, row, column + step, row + step), fill=colour)


def _summary(length: np.ndarray, split: np.ndarray, count: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    best = -np.sort(-truth, axis=1)
    discount = 1 / np.log2(np.arange(best.shape[1]) + 2)
    reachable = {f"recall@{k}": float(best[:, :k].sum(axis=1).mean()) for k in (5, 10, 20)}
    reachable |= {f"ndcg@{k}": float((best * discount)[:, :k].sum(axis=1).mean()) for k in (5, 10, 20)}
    return {
        "source": "sample_market",
        "num_users": len(length),
        "num_items": len(count),
        "num_interactions": int(length.sum()),
        "split": "leave_one_out",
        "split_counts": {
            name: int((split == code).sum())
            for name, code in (("train", splits.TRAIN), ("valid", splits.VALID), ("test", splits.TEST))
        },
        "history_length": {
            "min": int(length.min()),
            "median": float(np.median(length)),
            "mean": float(length.mean()),
            "max": int(length.max()),
        },
        "items_never_trained": int((count == 0).sum()),
        "dropped": {},
        "warnings": [],
        "market": {"best_reachable": reachable},
    }
