"""Interventions in a study: gradient wrappers as methods, orthogonality as a control."""

from __future__ import annotations

import pytest

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.eval.suite import load_suite
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.study.arms import check_arms
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.unlearn.config import UnlearnConfig

WEIGHTS = {"apart": 1.0, "sham": 0.0, "together": -0.1}


def study(**changes):
    controls = {
        name: {
            "take": "last",
            "changes": {
                "orthogonality": {"weight": weight, "after": "fit", "steps": 300},
                "watch": {"until": "max_steps"},
            },
        }
        for name, weight in WEIGHTS.items()
    }
    methods = {
        "npo": {},
        "npo_gru": {"method": {"name": "npo", "gradient": "gru"}},
        "npo_ortho": {"method": {"name": "npo", "gradient": "orthograd"}},
    }
    base = {"seeds": [0], "checkpoints": ["fit", "grok", *controls], "controls": controls, "methods": methods}
    return build_config(StudyConfig, {**base, "grok": {"data": {"preset": "world12"}}, **changes})


def test_a_study_plans_the_doses_and_the_wrapped_methods():
    config = study()
    check_arms(config, load_suite(config.suite))
    cells = plan(config)
    doses = {}
    for cell in cells:
        if cell.kind == "train" and cell.spec["config"]["orthogonality"] is not None:
            grok = build_config(GrokConfig, cell.spec["config"])
            assert grok.orthogonality is not None
            doses.setdefault(grok.orthogonality.weight, []).append(grok.exclude)
    assert doses == {weight: ["none", "forget"] for weight in WEIGHTS.values()}, "each with a gold of its own"
    labels = {build_config(UnlearnConfig, cell.spec["config"]).method.label for cell in cells if cell.kind == "unlearn"}
    assert labels == {"npo", "npo+gru", "npo+orthograd"}


def test_a_dose_s_last_weights_need_a_run_to_its_own_end():
    short = {"apart": {"take": "last", "changes": {"orthogonality": {"weight": 1.0}}}}
    config = study(controls=short, checkpoints=["fit", "apart"])
    with pytest.raises(UserError, match="controls.apart: takes 'last'.*max_steps"):
        check_arms(config, load_suite(config.suite))
