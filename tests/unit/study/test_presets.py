"""The studies that come with the package, as they are planned; that of questions runs in tests/integration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llm_unlearn.study.matrix import plan
from llm_unlearn.study.presets import quickstart, vision


def test_the_look_at_images_has_gold_four_checkpoints_and_five_methods():
    cells = plan(vision(Path("q"), 0))
    assert Counter(cell.kind for cell in cells) == {"train": 4, "unlearn": 20}
    assert {cell.label for cell in cells if cell.kind == "train"} == {
        "seed0", "seed0-gold", "easy/seed0", "easy/seed0-gold"}  # fmt: skip
    measured = {(cell.spec["checkpoint"], cell.spec["method"]) for cell in cells if cell.kind == "unlearn"}
    kinds, methods = ("fit", "fit_scaled", "grok", "easy"), ("finetune", "neggrad_plus", "nabla_tau", "scrub", "salun")
    assert measured == {(kind, method) for kind in kinds for method in methods}
    assert all(cell.spec["suite"] == "vision" for cell in cells if cell.kind == "unlearn")
    assert {cell.spec["config"]["data"]["kind"] for cell in cells if cell.kind == "train"} == {"digits"}


def test_the_main_job_has_gold_four_checkpoints_and_nine_methods():
    cells = plan(quickstart(Path("q"), 1, "short40"))
    assert Counter(cell.kind for cell in cells) == {"train": 2, "unlearn": 36}
    assert {cell.spec["seed"] for cell in cells} == {1}
