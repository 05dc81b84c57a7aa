"""The charts of comparisons can be read."""

import re

import pytest

from llmrec.evaluation.comparison import Compared, cost_chart
from llmrec.pages import drawing


@pytest.mark.parametrize("minutes", [(0.1, 0.11, 0.17), (21, 30, 49), (8, 17, 32), (1, 30, 900), (5,)])
def test_the_axis_of_costs_has_several_numbers_however_alike_the_times_are(minutes):
    test = {"ndcg@10": {"mean": 0.5}}
    rows = [Compared(name=str(place), test=test, minutes=each) for place, each in enumerate(minutes)]
    with drawing():
        page = cost_chart(rows)
    low, high = (page.index(f'id="matplotlib.axis_{number}"') for number in (1, 2))
    marks = [float(text) for text in re.findall(r">([\d.]+)</text>", page[low:high])]
    assert len(marks) >= 3 and min(marks) <= max(minutes) and max(marks) >= min(minutes)


def test_a_comparison_whose_times_nobody_knows_has_an_empty_chart():
    row = Compared(name="unknown", test={"ndcg@10": {"mean": 0.5}}, minutes=None)
    with drawing():
        page = cost_chart([row])
    assert page.startswith("<svg") and "unknown" not in page
