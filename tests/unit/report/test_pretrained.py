"""What a pretrained start and cheaper ways to grokking bring, from rows by hand."""

from __future__ import annotations

import pytest

from llm_unlearn.report.pretrained import pretrained
from llm_unlearn.report.results import Pretrained
from tests.unit.report import findings_data as made


@pytest.fixture
def content():
    return made.pretrained()


def grids(content):
    return {grid.title: grid for grid in pretrained(Pretrained.model_validate(content)).grids}


def line(grid, name):
    return next(row.cells for row in grid.rows if row.cells[0] == name)


def test_arms_tell_how_many_grokked_and_why_one_could_not_run(content):
    content["rows"][1]["phase"] = "memorised"
    rows = grids(content)["Does it grok"].rows
    assert [row.cells for row in rows] == [
        ("pretrained", "2 of 3", "0.5", "1", ""),
        ("scratch, distilled", "0 of 1", "–", "–", "no teacher"),
    ]


def test_models_stand_beside_the_one_grokked_from_scratch_by_seed(content):
    found = grids(content)
    assert found["What it brings"].columns[1:] == ("scratch, fit", "scratch, grok", "pretrained, grok")
    assert line(found["What it brings"], "NPO: kept")[1:] == ("0.61", "0.81", "0.71")
    beside = found["What it brings, beside grokked from scratch"]
    assert beside.columns[1:] == ("scratch, fit", "pretrained, grok")
    # three equal differences of numbers in steps of .01: half width 4.303 * sqrt(2 / 12) * .01 / sqrt(3) = .0101
    assert line(beside, "NPO: kept")[1:] == ("-0.2 [-0.21, -0.19]", "-0.1 [-0.11, -0.09]")
    assert line(beside, "NPO: updates")[1:] == ("–", "–"), "nothing measured"


def test_a_model_that_is_not_in_every_seed_says_so(content):
    content["brought"] = [row for row in content["brought"] if (row["seed"], row["arm"]) != (2, "pretrained")]
    content["brought"][3]["values"]["npo, kept_at_level"] = [None, 0.01]
    found = grids(content)
    assert line(found["What it brings"], "seeds")[1:] == ("3", "3", "2")
    assert line(found["What it brings"], "NPO: kept")[2] == "0.815 (n = 2)"
    assert line(found["What it brings, beside grokked from scratch"], "NPO: kept")[1:] == ("–", "–")


def test_a_file_without_models_probed_has_no_such_tables(content):
    content["brought"] = []
    assert not [title for title in grids(content) if title.startswith("What it brings")]
