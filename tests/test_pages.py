"""Figures of pages: what names their lines can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llmrec.pages import (
    drawing,
    environment,
    legend_above,
    line_looks,
    name_points,
    plot,
    spread_out,
    svg,
    thumbnail,
)


@pytest.mark.parametrize("length", [8, 30, 60])
def test_legends_stay_on_the_picture_and_leave_room_for_the_plot(length):
    with drawing():
        figure, axes = plot(6, 3)
        names = [f"{place} {'concat (concat_mode=sequence) ' * 2}"[:length] for place in range(6)]
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)
        legend_above(axes)
        figure.tight_layout()
        legend = axes.get_legend().get_window_extent()
        plotted, whole = axes.get_window_extent(), figure.bbox
        assert legend.x0 >= 0 and legend.x1 <= whole.x1 and legend.y1 <= whole.y1
        assert legend.y0 >= plotted.y1 - 1, "above the plot"
        assert plotted.width > 0.7 * whole.width and plotted.height > 0.3 * whole.height
        drawn = svg(figure)
    assert all(name.strip() in drawn for name in names)


@pytest.mark.parametrize("number", [1, 2, 8, 25])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "apart"])
def test_names_of_points_overlap_neither_each_other_nor_the_points(number, alike):
    step = 1e-9 if alike else 1
    points = {
        f"method {place} (concat_mode=sequence)": (1 + place, 2 + place * step) for place in range(number)
    }
    with drawing():
        figure, axes = plot(6, 5)
        for point in points.values():
            axes.plot(*point, "o", markersize=5)
        name_points(axes, points)
        figure.tight_layout()
        boxes = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == sorted(points)
    places = axes.transData.transform(list(points.values()))
    for place, box in enumerate(boxes):
        assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert not any(box.contains(*point) for point in places)
    for text in axes.texts:  # each points to its own
        assert text.xy == points[text.get_text()]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.01, 0.1))
def test_heights_are_spread_out_as_little_as_needed(heights, apart):
    wanted = np.sort(heights)[::-1]
    found = spread_out(wanted, apart)
    assert (found[:-1] - found[1:] >= apart - 1e-9).all()
    assert found.min() >= -1e-9 and found.max() <= 1 + 1e-9
    if (wanted[:-1] - wanted[1:] >= apart).all():
        np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_settings_on_a_page_show_no_password():
    page = environment(Path(__file__).parent).from_string("{{ mirrors | setting }} {{ none | setting }}")
    shown = page.render(mirrors=("https://ann:s3cret@mirror.example/a",), none=None)
    assert shown == "https://[hidden]@mirror.example/a none"


def test_drawing_leaves_the_plots_of_a_notebook_alone():
    """Its backend stays, and no figure of ours is shown with those of the user."""
    code = (
        "import sys; from llmrec import pages\n"
        "import llmrec.evaluation.report, llmrec.evaluation.comparison, llmrec.semantic_ids.report\n"
        "with pages.drawing(): figure, axes = pages.plot(3, 2); axes.plot([0, 1]); pages.svg(figure)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_draw_though_a_notebooks_backend_is_not_to_be_had():
    """Jupyter names one of its own environment to every command that is begun from it."""
    code = "from llmrec.console import guarded; guarded(lambda: print(__import__('llmrec.pages').pages.plot))"
    beside = os.environ | {"MPLBACKEND": "module://of_another_environment.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], env=beside, capture_output=True, text=True)
    assert done.stdout.startswith("<function plot") and done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "percent", "share"),
    [
        (0, "0.0%", "0%"),
        (1.0, "100.0%", "100%"),
        (0.00008, "&lt; 0.1%", "&lt; 1%"),
        (255 / 256, "99.6%", "&gt; 99%"),
        (0.9999, "&gt; 99.9%", "&gt; 99%"),
        (0.844, "84.4%", "84%"),
        (1.2, "120.0%", "120%"),
    ],
)
def test_a_share_that_is_rounded_reads_neither_as_nothing_nor_as_all(value, percent, share, tmp_path):
    """A code of 256 that is dead must show."""
    shown = environment(tmp_path).from_string("{{ value | percent }} {{ [value] | map('share') | join }}")
    assert shown.render(value=value) == f"{percent} {share}"


def test_a_picture_that_pillow_gives_up_is_left_out(monkeypatch):
    """Its AVIF reader raises RuntimeError for a broken file."""

    def broken(_: Path) -> Image.Image:
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image, "open", broken)
    assert thumbnail(Path("x.avif")) is None


def test_many_lines_look_different():
    looks = [(look["color"], look["linestyle"]) for look in line_looks(30)]
    assert len(set(looks)) == 30 and len({colour for colour, _ in looks[:5]}) == 5
    assert line_looks(31)[30] == line_looks(1)[0], "and begin again"
