"""Reports and comparisons, opened in a real headless browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrec.evaluation.comparison import Section, as_page
from llmrec.evaluation.tables import Table

DESK, PHONE = (1280, 900), (390, 844)
OVERHANG = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def opened(browser: Any, page: Path, size: tuple[int, int]) -> Any:
    """The page in a window of this size, once it has loaded without an error; nothing hangs over its edge."""
    errors: list[str] = []
    window = browser.new_page(viewport={"width": size[0], "height": size[1]})
    window.on("console", lambda message: errors.append(message.text))
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.goto(page.as_uri())
    assert window.evaluate(OVERHANG) == 0
    assert not errors
    return window


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_run_s_report_has_its_pictures_and_tables(size, browser, finished):
    window = opened(browser, finished / "evaluate" / "report.html", size)
    assert window.locator("svg").count() > 3 and window.locator("table").count() > 3
    widths = window.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths and min(widths) > 0
    for place in range(window.locator("summary").count()):
        window.locator("summary").nth(place).click()
    assert window.evaluate(OVERHANG) == 0, "nor when everything is unfolded"
    window.close()


@pytest.fixture
def compared(tmp_path) -> Path:
    """The page of a comparison with long names, in headings and paths."""
    metrics = [f"{name}@{k}" for k in (5, 10, 20) for name in ("recall", "ndcg")]
    head = ["method", "seeds", "ndcg@10 minus mme_sid (95 % interval)", "seen kept: recall@10", "s / epoch"]
    cells = ["fuxi-request (ce)", "3 of 3", "-0.0153 (-0.0261 to -0.0037)", "0.4110 ± 0.0027", "10.6"]
    lengths = ["0-5 (11,383 users)", "6-10 (7,433 users)", "11-20 (2,528 users)", "101-200 (16 users)"]
    sections = [
        Section(table=Table([*head, *metrics], [[*cells, *["0.4110"] * 6]])),
        Section(title="lengths", table=Table(["method", *lengths, *lengths], [["fuxi", *["0.0797"] * 8]])),
    ]
    path = tmp_path / "report.html"
    path.write_text(as_page("Compared", sections, ["Command: --set a=/folder" + "/of/a/folder" * 20]))
    return path


def test_tables_of_comparisons_fit_a_screen(browser, compared):
    """Headings take several lines, and break outside of brackets."""
    window = opened(browser, compared, DESK)
    hidden = "[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth)"
    assert window.evaluate(hidden) == [0, 0]
    headings = [text for text in window.locator("th").all_inner_texts() if "users" in text]
    assert len(headings) == 8 and all("\N{NO-BREAK SPACE}users)" in text for text in headings)
    window.close()


def test_tables_of_comparisons_scroll_on_a_phone(browser, compared):
    window = opened(browser, compared, PHONE)
    box = window.locator(".scroll").first
    assert box.evaluate("box => box.scrollWidth - box.clientWidth") > 0
    box.evaluate("box => box.scrollBy(2000, 0)")
    last = window.locator("table").first.locator("th").last.bounding_box()
    assert last["x"] + last["width"] <= PHONE[0]
    window.close()
