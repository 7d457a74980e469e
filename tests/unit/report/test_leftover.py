"""The figure of what is left of the forgotten."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from llm_unlearn.report.leftover import left_over
from llm_unlearn.report.plots import COLOURS, described


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter("text")]


def test_a_panel_per_method_says_how_it_was_asked_for(make_study):
    runs = make_study([0, 1, 2], ("fit", "grok"))
    panels = left_over(runs, ("npo", "ga", "rmu"), ("fit", "grok", "easy"))
    assert list(panels) == ["npo", "ga"], "of rmu there is no run"
    said = texts(panels["npo"])
    assert {"the forgotten fact itself", "any held-out question that needs it", "share answered, npo"} <= set(said)
    assert "backwards" not in said, "no such questions were asked"
    assert {"fit", "grok", "before", "gold"} <= set(said)
    assert "easy" not in said
    assert described(panels["npo"]) == "What is left of the forgotten with npo from fit and grok"


def test_one_seed_has_no_interval(make_study):
    def lines(seeds: list[int]) -> int:
        panel = left_over(make_study(seeds, ("fit",)), ("npo",), ("fit",))["npo"]
        return len(re.findall(rf"stroke: var\(--fit, {COLOURS['fit']}\); stroke-width: 2", panel))

    assert (lines([0]), lines([0, 1, 2])) == (0, 2)


def test_of_images_which_are_asked_in_one_way_there_is_none(make_study):
    runs = [run for run in make_study([0, 1], ("fit",))]
    for run in runs:
        for name in [name for name in run.metrics if name.startswith("forget_") and name != "forget_acc"]:
            del run.metrics[name]
    assert left_over(runs, ("npo",), ("fit",)) == {}
