"""Pictures of every mode become upright RGB over white."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from llmrec.encoders.pictures import read_picture

RED, GREY = (220, 10, 20), (100, 100, 100)


def read(path):
    return read_picture(path, "a", max_pixels=10_000, on_error="error")


def halves(mode, left, right):
    """A 4 x 2 picture with two colours."""
    image = Image.new(mode, (4, 2), right)
    image.paste(left, (0, 0, 2, 2))
    return image


def palette(transparent):
    image = halves("RGB", RED, (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    if transparent:
        image.info["transparency"] = image.getpixel((3, 0))
    return image


PICTURES = {
    "RGB": (halves("RGB", RED, GREY), RED, GREY),
    "grey": (halves("L", 30, 200), (30,) * 3, (200,) * 3),
    "grey and alpha": (halves("LA", (30, 255), (30, 0)), (30,) * 3, (255,) * 3),
    "alpha": (halves("RGBA", (*RED, 255), (*RED, 0)), RED, (255,) * 3),
    "half alpha": (halves("RGBA", (0, 0, 0, 255), (0, 0, 0, 51)), (0,) * 3, (204,) * 3),
    "palette": (palette(False), RED, (0, 0, 255)),
    "palette and alpha": (palette(True), RED, (255,) * 3),
    "black and white": (halves("1", 0, 1), (0,) * 3, (255,) * 3),
    "16-bit grey": (
        Image.fromarray(np.repeat(np.array([[0, 0, 65535, 65535]], np.uint16), 2, 0)),
        (0,) * 3,
        (255,) * 3,
    ),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_mode_becomes_rgb_over_white(tmp_path, kind):
    image, left, right = PICTURES[kind]
    image.save(tmp_path / "x.png")
    found = read(tmp_path / "x.png")
    assert found.mode == "RGB" and found.size == (4, 2)
    assert (found.getpixel((0, 0)), found.getpixel((3, 1))) == (left, right)


def test_cmyk_jpegs_and_grey_jpegs_are_read(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = read(tmp_path / "x.jpg").getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60
    Image.new("L", (8, 8), 77).save(tmp_path / "y.jpg")
    assert read(tmp_path / "y.jpg").getpixel((4, 4)) == (77, 77, 77)


def test_greys_in_floats_are_scaled_whatever_their_range(tmp_path):
    for top in (1, 255):
        values = np.array([[0, 0.4, 1, np.nan]], np.float32) * top
        Image.fromarray(values).save(tmp_path / "x.tiff")
        found = read(tmp_path / "x.tiff")
        assert [found.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (102,) * 3, (255,) * 3, (0,) * 3]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    halves("RGB", RED, GREY).save(tmp_path / "x.png", exif=exif)
    found = read(tmp_path / "x.png")
    assert found.size == (2, 4)
    assert (found.getpixel((0, 0)), found.getpixel((0, 3))) == (RED, GREY)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert np.array_equal(read(tmp_path / "x.png"), expected)


@pytest.mark.parametrize(
    ("tag", "kind", "value"), [(0x0110, 11, b"\0\0\x80?"), (0x011A, 2, b"abc\0"), (0x8825, 9, b"\xff" * 4)]
)
def test_a_picture_whose_exif_cannot_be_written_again_is_read(tmp_path, tag, kind, value):
    """A camera model in floats, a resolution in letters, and a place that lies nowhere in the file."""
    entries = [(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, len(value) if kind == 2 else 1, value)]
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)
    halves("RGB", RED, GREY).save(tmp_path / "x.png", exif=exif)
    assert read(tmp_path / "x.png").size == (2, 4)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the damage it meets
def test_damaged_files_never_raise_anything_but_the_named_error(tmp_path):
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    for suffix in (
        "jpg",
        "png",
        "gif",
        "webp",
        "tiff",
        "bmp",
        "dds",
        *(["avif"] if features.check("avif") else []),
    ):
        path = tmp_path / f"x.{suffix}"
        source.save(path)
        content = path.read_bytes()
        for trial in range(60):
            damaged = bytearray(content[: rng.integers(0, len(content))] if trial % 3 == 0 else content)
            if damaged:
                for place in rng.integers(0, min(len(damaged), 200), 4):
                    damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged)
            found = read_picture(path, "a", max_pixels=10_000, on_error="missing")
            assert found is None or found.mode == "RGB"
