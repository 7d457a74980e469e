"""Finished cells keep their ids when configs get new keys."""

from __future__ import annotations

from pathlib import Path

from llm_unlearn.config import build_config, digest, flatten, load_config
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.identity import LATER, as_before
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.tune import plan_tuning
from llm_unlearn.unlearn.config import UnlearnConfig

CONFIGS = Path(__file__).parents[3] / "recipes/configs/study"
KNOWN = {  # of the cells' ids before images, SAM and the rest; a new key belongs into LATER
    ("leaderboard", plan): "cc3b9811304088ee",
    ("leaderboard", plan_tuning): "ce923901b590ee77",
    ("prepost", plan): "486effc2b9ead8c5",
}


def test_studies_from_before_keep_their_cells(monkeypatch):
    monkeypatch.setattr("llm_unlearn.study.matrix.__version__", "0.1.0")
    for (name, planner), known in KNOWN.items():
        cells = planner(load_config(StudyConfig, CONFIGS / f"{name}.yaml"))
        assert digest([cell.id for cell in cells])[:16] == known, (name, planner.__name__)


def test_what_came_later_is_left_out_only_at_the_value_it_always_had():
    spec = {"seed": 1, "config": {"loss": "ce", "data": {"image": {"train": 400, "gray": False}, "seed": 1}, "x": {}}}
    assert as_before(spec) == {"seed": 1, "config": {"data": {"seed": 1}, "x": {}}}
    other = {"config": {"loss": "mse", "data": {"image": {"train": 401, "gray": False}}}}
    assert as_before(other) == {"config": {"loss": "mse", "data": {"image": {"train": 401}}}}


def test_the_values_are_the_defaults():
    """Else the id of a run with the default would be that of another one."""
    found = [flatten({"config": cls().model_dump(mode="json")}) for cls in (GrokConfig, UnlearnConfig)]
    for defaults in found:
        assert {key: defaults[key] for key in LATER if key in defaults} == {k: LATER[k] for k in LATER if k in defaults}
    assert not LATER.keys() - {key for defaults in found for key in defaults}


def test_a_knob_that_came_later_is_in_the_id_where_it_is_turned():
    base = {"seeds": [0], "methods": {"npo": {}}, "grok": {"data": {"preset": "world12"}}}
    turned = {**base, "grok": {**base["grok"], "loss": "mse"}}
    plain, other = (plan(build_config(StudyConfig, values)) for values in (base, turned))
    assert not {cell.id for cell in plain} & {cell.id for cell in other}
