"""The page for people, used in a real headless browser."""

from __future__ import annotations

import pytest
from test_server import Running

from llmrec.inference.recommender import Recommender
from llmrec.inference.server import application


@pytest.fixture(scope="module")
def page_at(packaged, finished, browser):
    first, second = (Recommender.from_pretrained(packaged) for _ in range(2))
    second.scores.matrix = -second.scores.matrix  # an adapter of other opinions
    images = finished / "prepare_data" / "images"
    app = application(
        {"first": first, "second": second}, images=images, names={"first": "ours", "second": "theirs"}
    )
    with Running(app) as address:
        yield browser, address, first


def ranked(page, model: str) -> list[str]:
    rows = page.locator(f"ol[data-model={model}] li")
    return [rows.nth(place).get_attribute("data-id") for place in range(rows.count())]


@pytest.mark.parametrize("size", [(1200, 900), (360, 740)], ids=["desk", "phone"])
def test_search_build_a_history_compare_two_models(size, page_at, tmp_path):
    browser, address, recommender = page_at
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("ol[data-model=second] li")
    title, name = recommender.titles[3], recommender.raw_ids[3]
    page.fill("#query", title)
    page.click("#form button")
    page.wait_for_selector(f"#items button[data-id={name}]")
    page.click(f"#items button[data-id={name}]")
    expected = [item.item_id for item in recommender.recommend([[name]], k=10)[0]]
    shown = "[...document.querySelectorAll('ol[data-model=first] li')].map(row => row.dataset.id).join()"
    page.wait_for_function(f"wanted => {shown} === wanted", arg=",".join(expected))
    assert ranked(page, "second") != expected and len(ranked(page, "second")) == 10
    assert page.locator("#history li").count() == 1 and page.locator("#lists img").first.is_visible()
    assert page.evaluate("document.querySelector('#lists img').naturalWidth") > 0
    assert {"ours", "theirs"} == set(page.locator("#lists h3").all_text_contents())
    assert page.locator(".parts i").count() >= 10
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, "nothing hangs over the edge"
    page.uncheck("#both")
    page.wait_for_function("document.querySelectorAll('#lists section').length === 1")
    page.check("#seen")
    page.click("#history button")
    page.wait_for_function("document.querySelectorAll('#history li').length === 0")
    page.fill("#query", "no such words")
    page.click("#form button")
    page.wait_for_selector("text=no item holds these words")
    assert not errors
    page.close()
