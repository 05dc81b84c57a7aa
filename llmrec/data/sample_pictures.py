"""Pictures of the sample market's items: a silhouette per noun, filled with a colour and a pattern."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Width and height of a picture, in pixels."""

COLOURS = {
    "red": (205, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (235, 205, 45),
    "green": (60, 155, 70),
    "blue": (45, 95, 200),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 80, 50),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag", "faded")
SIZES = {"small": 0.72, "": 0.86, "large": 1.0}
"""Word in the title, and scale of the silhouette."""

# Parts are (kind, coordinates in 0..100 with y downwards); kinds that end in "-" cut out again.
Part = tuple[str, tuple[float, ...]]
SHAPES: dict[str, tuple[Part, ...]] = {
    "backpack": (
        ("ring", (36, 4, 64, 34)),
        ("round", (22, 16, 78, 94)),
        ("box-", (32, 42, 68, 45)),
        ("box-", (30, 62, 70, 65)),
        ("box", (14, 50, 20, 86)),
        ("box", (80, 50, 86, 86)),
    ),
    "ball": (("oval", (10, 10, 90, 90)), ("arc-", (-40, 10, 40, 90)), ("arc-", (60, 10, 140, 90))),
    "bell": (
        ("oval", (44, 4, 56, 18)),
        ("slice", (20, 12, 80, 92)),
        ("poly", (20, 50, 80, 50, 92, 80, 8, 80)),
        ("oval", (42, 78, 58, 94)),
    ),
    "boot": (("poly", (24, 6, 58, 6, 58, 54, 84, 64, 94, 78, 94, 92, 24, 92)), ("box-", (24, 82, 94, 85))),
    "book": (
        ("poly", (6, 18, 48, 26, 48, 90, 6, 82)),
        ("poly", (94, 18, 52, 26, 52, 90, 94, 82)),
        ("line-", (14, 40, 40, 45)),
        ("line-", (86, 40, 60, 45)),
        ("line-", (14, 58, 40, 63)),
        ("line-", (86, 58, 60, 63)),
    ),
    "cactus": (
        ("round", (38, 6, 62, 72)),
        ("round", (12, 26, 26, 54)),
        ("box", (12, 44, 40, 54)),
        ("round", (74, 18, 88, 48)),
        ("box", (60, 38, 88, 48)),
        ("poly", (24, 74, 76, 74, 68, 96, 32, 96)),
    ),
    "candle": (
        ("poly", (50, 2, 59, 20, 50, 28, 41, 20)),
        ("box", (36, 32, 64, 82)),
        ("oval", (12, 76, 88, 96)),
    ),
    "chair": (
        ("box", (24, 4, 34, 96)),
        ("box", (24, 8, 70, 16)),
        ("box", (24, 24, 70, 32)),
        ("box", (62, 4, 70, 52)),
        ("box", (24, 48, 82, 60)),
        ("box", (74, 48, 82, 96)),
    ),
    "clock": (
        ("oval", (8, 8, 92, 92)),
        ("oval-", (18, 18, 82, 82)),
        ("line", (50, 50, 50, 24)),
        ("line", (50, 50, 68, 60)),
    ),
    "drum": (
        ("oval", (8, 12, 92, 42)),
        ("oval", (8, 62, 92, 92)),
        ("box", (8, 27, 92, 77)),
        ("arc-", (8, 12, 92, 42)),
    ),
    "glasses": (
        ("ring", (2, 32, 46, 76)),
        ("ring", (54, 32, 98, 76)),
        ("box", (42, 46, 58, 54)),
        ("line", (6, 42, 20, 18)),
        ("line", (94, 42, 80, 18)),
    ),
    "guitar": (
        ("oval", (18, 54, 82, 98)),
        ("oval", (26, 34, 74, 70)),
        ("box", (45, 2, 55, 60)),
        ("box", (40, 2, 60, 14)),
        ("oval-", (41, 56, 59, 74)),
    ),
    "hat": (
        ("oval", (2, 62, 98, 88)),
        ("poly", (28, 76, 32, 20, 68, 20, 72, 76)),
        ("box-", (27, 58, 73, 62)),
    ),
    "key": (
        ("oval", (6, 30, 46, 70)),
        ("oval-", (17, 41, 35, 59)),
        ("box", (42, 45, 96, 55)),
        ("box", (74, 50, 81, 72)),
        ("box", (88, 50, 95, 68)),
    ),
    "kite": (
        ("poly", (50, 2, 84, 36, 50, 78, 16, 36)),
        ("line-", (50, 2, 50, 78)),
        ("line-", (16, 36, 84, 36)),
        ("line", (50, 78, 60, 88)),
        ("line", (60, 88, 50, 98)),
    ),
    "ladder": (
        ("poly", (24, 2, 34, 2, 26, 98, 16, 98)),
        ("poly", (66, 2, 76, 2, 84, 98, 74, 98)),
        ("box", (26, 16, 74, 23)),
        ("box", (25, 38, 75, 45)),
        ("box", (24, 60, 76, 67)),
        ("box", (22, 82, 78, 89)),
    ),
    "lamp": (("poly", (34, 4, 66, 4, 88, 50, 12, 50)), ("box", (46, 50, 54, 86)), ("oval", (26, 82, 74, 96))),
    "lantern": (
        ("ring", (34, 0, 66, 32)),
        ("poly", (50, 14, 80, 34, 20, 34)),
        ("box", (24, 38, 34, 82)),
        ("box", (66, 38, 76, 82)),
        ("oval", (41, 46, 59, 78)),
        ("box", (18, 84, 82, 96)),
    ),
    "mug": (("ring", (54, 30, 98, 76)), ("round", (10, 16, 70, 92)), ("box-", (17, 22, 63, 26))),
    "rocket": (
        ("slice", (32, 0, 68, 60)),
        ("box", (32, 30, 68, 76)),
        ("oval-", (42, 32, 58, 48)),
        ("poly", (32, 52, 10, 84, 32, 76)),
        ("poly", (68, 52, 90, 84, 68, 76)),
        ("poly", (40, 80, 60, 80, 50, 99)),
    ),
    "sailboat": (
        ("poly", (46, 4, 46, 64, 8, 64)),
        ("poly", (54, 16, 88, 64, 54, 64)),
        ("poly", (4, 70, 96, 70, 78, 94, 22, 94)),
    ),
    "teapot": (
        ("oval", (20, 30, 78, 90)),
        ("oval", (42, 12, 56, 28)),
        ("box", (32, 26, 66, 33)),
        ("poly", (70, 62, 90, 30, 99, 34, 78, 80)),
        ("ring", (0, 38, 36, 78)),
    ),
    "tent": (
        ("poly", (50, 8, 98, 90, 2, 90)),
        ("poly-", (50, 42, 66, 90, 34, 90)),
        ("line", (50, 12, 50, 2)),
    ),
    "umbrella": (
        ("slice", (4, 8, 96, 104)),
        ("oval-", (4, 48, 35, 66)),
        ("oval-", (35, 48, 65, 66)),
        ("oval-", (65, 48, 96, 66)),
        ("box", (47, 40, 53, 90)),
        ("box", (34, 86, 53, 92)),
        ("box", (34, 78, 40, 92)),
    ),
}
NOUNS = tuple(SHAPES)


def draw(noun: str, colour: str, pattern: str, scale: float, angle: float) -> bytes:
    """A picture as a PNG file.

    Args:
        noun: which silhouette, one of NOUNS.
        colour: fill, one of COLOURS.
        pattern: one of PATTERNS.
        scale: size of the silhouette; 1 fills the picture.
        angle: turn, in degrees.
    """
    shape = silhouette(noun).rotate(angle, Image.Resampling.BILINEAR)
    size = round(SIZE * scale)
    inside = Image.new("L", (SIZE, SIZE))
    inside.paste(shape.resize((size, size), Image.Resampling.BOX), ((SIZE - size) // 2,) * 2)
    fill = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    shade = tuple(int(0.35 * value + 0.65 * 255) for value in COLOURS[colour])
    fill.paste(Image.new("RGB", (SIZE, SIZE), shade), mask=pattern_mask(pattern))
    picture = Image.new("RGB", (SIZE, SIZE), (247, 246, 242))
    picture.paste(fill, mask=inside)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=4)
    return file.getvalue()


@functools.cache
def silhouette(noun: str) -> Image.Image:
    """The shape as a mask, twice the picture's size."""
    large = 4 * SIZE
    mask = Image.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    for kind, coordinates in SHAPES[noun]:
        place = [value * large / 100 for value in coordinates]
        value, kind = (0, kind[:-1]) if kind.endswith("-") else (255, kind)
        if kind == "oval":
            pen.ellipse(place, fill=value)
        elif kind == "ring":
            pen.ellipse(place, outline=value, width=large * 7 // 100)
        elif kind == "arc":
            pen.ellipse(place, outline=value, width=large * 3 // 100)
        elif kind == "box":
            pen.rectangle(place, fill=value)
        elif kind == "round":
            pen.rounded_rectangle(place, radius=large * 10 // 100, fill=value)
        elif kind == "slice":
            pen.pieslice(place, 180, 360, fill=value)
        elif kind == "line":
            pen.line(place, fill=value, width=large * 5 // 100)
        else:
            assert kind == "poly", kind
            pen.polygon(place, fill=value)
    return mask.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BOX)


@functools.cache
def pattern_mask(pattern: str) -> Image.Image:
    """Where the lighter shade of the colour goes, as a mask of the picture's size."""
    y, x = np.mgrid[:SIZE, :SIZE]
    light = {
        "plain": np.zeros((SIZE, SIZE)),
        "striped": (x + y) % 14 < 5,
        "dotted": (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 11,
        "checked": (x // 8 + y // 8) % 2,
        "zigzag": (y + np.abs(x % 16 - 8)) % 12 < 4,
        "faded": y / SIZE * 0.9,
    }[pattern]
    return Image.fromarray((light * 255).astype(np.uint8))
