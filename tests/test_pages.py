"""Figures of pages: what names their lines can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llmrec.pages import drawing, environment, legend_above, plot, svg, thumbnail


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
