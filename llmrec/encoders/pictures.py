"""Reading pictures: any mode to RGB over white, turned upright, with a limit on their size."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from llmrec.errors import DataError

BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError)
"""What Pillow's readers raise for broken files; UnidentifiedImageError is an OSError."""

UPRIGHT = dict(
    zip(
        range(2, 9),
        (
            *(Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
            *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE),
            Image.Transpose.ROTATE_90,
        ),
    )
)
"""What turns a picture upright, by EXIF's orientation; 1 is upright."""

IN_A_CATALOGUE = (
    "Replace the file, delete it and clear the item's image path, or set encode_items.image.on_error=missing"
)


def read_picture(
    file: Path, raw_id: str, *, max_pixels: int, on_error: str, advice: str = IN_A_CATALOGUE
) -> Image.Image | None:
    """The picture of an item as RGB; None if it cannot be read and on_error is ``missing``.

    Raises:
        DataError: the file is absent, broken, no picture or too large, and on_error is ``error``.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{width} x {height} pixels, more than image.max_pixels={max_pixels}; "
                    "shrink it or raise the limit"
                )
            return to_rgb(image)
    except BROKEN as error:
        if on_error == "missing":
            return None
        raise DataError(
            f"{file}, the picture of item {raw_id!r}, cannot be read ({error}). {advice}"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB: transparent parts white, EXIF orientation applied, 16-bit greys scaled, and greys in
    floats too, which run from 0 to 1 unless one is above."""
    image.load()  # some files hold EXIF behind the pixels
    # Not by ImageOps.exif_transpose, which writes all of EXIF again and fails where a tag is of another type.
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.int64) // 257
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
