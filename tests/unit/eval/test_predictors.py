"""Which probe predicts the outcome: found where there is one, not where there is none, and no more than the label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from llm_unlearn.eval.predictors import Cell, predict
from llm_unlearn.report.predictors import predictor_grid

KINDS = ("early", "fit", "grok", "post")
METHODS = ("ga", "npo")


def study(seed, n_seeds=10, effect=1.0, label=1.0, noise=0.3):
    """Probes `true` (drives the outcome), `label` (the checkpoint's number and noise), `nothing`; the outcomes."""
    draw = np.random.default_rng(seed)
    probes = {name: {} for name in ("true", "label", "nothing")}
    outcomes = {}
    for s in range(n_seeds):
        for k, kind in enumerate(KINDS):
            x = label * k + draw.normal()
            probes["true"][s, kind] = x
            probes["label"][s, kind] = label * k + 0.1 * draw.normal()
            probes["nothing"][s, kind] = draw.normal()
            for m, method in enumerate(METHODS):
                outcomes[Cell(s, kind, method)] = effect * x + 3 * m + noise * draw.normal()
    return probes, outcomes


def test_a_driver_is_found_and_the_label_s_shadow_is_told_from_it():
    lines = {line.probe: line for line in predict(*study(0))}
    true, label, nothing = (lines[name] for name in ("true", "label", "nothing"))
    assert next(iter(lines)) == "true", "largest gain beyond the checkpoint first"
    assert true.rank.mean > 0.8
    assert true.r2.lo > 0.7
    assert true.beyond_kind.lo > 0.7
    assert true.p_beyond_holm < 0.05
    assert label.rank.lo > 0, "it grows with training, and so does the outcome"
    assert label.r2.lo > 0
    assert label.beyond_kind.lo < 0.05, "and says no more than the label"
    assert label.p_beyond_holm > 0.05
    assert nothing.r2.mean < 0.05
    assert nothing.p_holm > 0.05
    assert (true.seeds, true.cells) == (10, 80)


def test_the_numbers_are_those_of_a_plain_calculation():
    probes, outcomes = study(1, n_seeds=4)
    only = {cell: y for cell, y in outcomes.items() if cell.method == "ga"}
    found = predict({"true": probes["true"]}, only)[0]
    ranks = [spearmanr([probes["true"][s, k] for k in KINDS], [only[Cell(s, k, "ga")] for k in KINDS]).statistic
             for s in range(4)]  # fmt: skip
    assert found.rank.mean == pytest.approx(np.mean(ranks))
    table = np.array([[(probes["true"][s, k], only[Cell(s, k, "ga")]) for k in KINDS] for s in range(4)])
    errors = np.zeros(4)
    for s in range(4):
        train, (x, y) = np.delete(table, s, 0), table[s].T
        slope, intercept = np.polyfit(*train.reshape(-1, 2).T, 1)
        errors[:2] += ((y - train[..., 1].mean()) ** 2).sum(), ((y - slope * x - intercept) ** 2).sum()
        mean_x, mean_y = train.mean(0).T
        a, b = (train - train.mean(0)).reshape(-1, 2).T
        errors[2:] += ((y - mean_y) ** 2).sum(), ((y - mean_y - (a @ b) / (a @ a) * (x - mean_x)) ** 2).sum()
    assert found.r2.mean == pytest.approx(1 - errors[1] / errors[0])
    assert found.beyond_kind.mean == pytest.approx(1 - errors[3] / errors[2])


def test_no_false_discovery():
    """Probes that mean nothing, outcomes that only know their checkpoint: 5 % of studies may be misled, no more."""
    misled = {"p_holm": 0, "p_beyond_holm": 0}
    for run in range(150):
        draw = np.random.default_rng(run)
        probes = {f"p{i}": {(s, k): draw.normal() for s in range(8) for k in KINDS} for i in range(3)}
        lift = draw.normal(size=8)
        outcomes = {Cell(s, k, "ga"): i + lift[s] + draw.normal() for s in range(8) for i, k in enumerate(KINDS)}
        lines = predict(probes, outcomes, seed=run)
        for which in misled:
            misled[which] += any(getattr(line, which) <= 0.05 for line in lines)
    assert all(n <= 15 for n in misled.values()), misled  # .05 of 150 and 2.8 standard errors


def test_a_probe_is_judged_on_the_cells_it_has():
    probes, outcomes = study(2, n_seeds=6)
    probes["true"] = {key: v for key, v in probes["true"].items() if key[0] != 5}
    probes["true"][0, "fit"] = float("nan")
    lines = {line.probe: line for line in predict(probes, outcomes)}
    assert (lines["true"].seeds, lines["true"].cells) == (5, 38)
    assert lines["label"].seeds == 6


def test_a_checkpoint_that_one_seed_alone_has_is_not_predicted():
    probes, outcomes = study(3, n_seeds=5)
    for method in METHODS:
        outcomes[Cell(0, "extra", method)] = 1e6
    probes["true"][0, "extra"] = 0.0
    with_extra = predict({"true": probes["true"]}, outcomes)[0]
    assert with_extra.beyond_kind.mean > 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, o: ({k: v for k, v in p.items() if k[0] < 3}, o), "3 seeds and 4 checkpoints; 4 seeds and 2"),
        (lambda p, o: ({k: v for k, v in p.items() if k[1] == "fit"}, o), "10 seeds and 1 checkpoints"),
        (lambda p, o: (dict.fromkeys(p, 1.0), o), "is the same in every cell"),
        (lambda p, o: (p, dict.fromkeys(o, 0.5)), "is the same in every cell"),
    ],
)
def test_what_cannot_be_judged_is_told(change, says):
    probes, outcomes = study(4)
    values, outcomes = change(probes["true"], outcomes)
    with pytest.raises(ValueError, match=says):
        predict({"true": values}, outcomes)


def test_a_seed_s_numbers_repeat():
    assert predict(*study(5), seed=3) == predict(*study(5), seed=3)


def test_the_grid_says_what_was_found():
    lines = predict(*study(0))
    grid = predictor_grid("two-hop leak", lines)
    assert [row.cells[0] for row in grid.rows] == [line.probe for line in lines]
    assert all(len(row.cells) == len(grid.columns) for row in grid.rows)
    assert grid.notes[0] == "More than the checkpoint's name: true."
    none = predictor_grid("two-hop leak", [line for line in lines if line.probe != "true"])
    assert none.notes[0] == "None of 2 probes is shown to be more than the checkpoint's name."
    assert not any("so few seeds" in note for note in none.notes), "ten seeds: 2 x .00195"
    few = predictor_grid("two-hop leak", [replace(line, seeds=5) for line in lines])
    assert few.notes[1].startswith("Flipping the signs of so few seeds gives p = 0.0625 at the least, 0.188 after Holm")
