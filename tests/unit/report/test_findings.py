"""The page of findings: from the files of a folder alone, the same every time, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.cli import main
from llm_unlearn.errors import UserError
from llm_unlearn.report.claims import BY_DESIGN
from llm_unlearn.report.costs import paid_back, training_cost, training_ratios
from llm_unlearn.report.findings import Page, findings, markdown, write_findings
from llm_unlearn.report.local_grokking import local_claims
from llm_unlearn.report.probe_table import probe_claims, probe_grids
from llm_unlearn.report.results import LANGUAGE, LOCAL, PRETRAINED, SIMULATION, VISION, Tuning, read_results
from llm_unlearn.report.secondary import levels_grid, reached_grid, requests_grid, secondary_grid
from llm_unlearn.report.section import behind, studied
from llm_unlearn.report.text import DASH, printable
from llm_unlearn.report.told import departures, infeasible, told
from tests.unit.report import findings_data as made

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
MORE = {"fit": (0.1, 0.12, 0.08), "easy": (0.0, 0.0, 0.01)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that a page is made of, small."""
    where = tmp_path_factory.mktemp("results")
    lang = made.content(made.outcomes(MORE, 6, fit=30))
    images = made.images(made.outcomes({"fit": (0.0, 0.01, 0.0), "easy": (-0.1,) * 3}, 6, images=True, grok=50))
    shutil.copy(RESULTS / "stats_simulation.json", where)
    return made.write(where, language=lang, vision_digits_cnn=images, local_grokking=made.local(),
                      pretrained_start=made.pretrained())  # fmt: skip


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return findings(read_results(folder))


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> list[Path]:
    where = tmp_path_factory.mktemp("written")
    return write_findings(folder, where / "findings.md", where / "f.html")


def page_of(where: Path) -> str:
    return markdown(findings(read_results(where)), "f")


def test_the_page_is_the_same_every_time_and_comes_from_the_files_alone(folder, written, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied)
    again = write_findings(copied, tmp_path / "b/findings.md", tmp_path / "b/f.html")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written]
    assert {p.suffix for p in written} == {".md", ".html", ".svg"}


def test_markdown_shows_figures_that_are_there_and_whole(written):
    where = written[0].parent
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", written[0].read_text())
    assert "findings/answer.svg" in shown
    assert len(shown) == 1 + 2 * 3 + 3, "of words three more: what is left"
    for name in shown:
        root = ET.fromstring((where / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in (where / name).read_text(), "a file of its own has no page to give it colours"


def test_html_is_one_file_without_scripts_and_with_the_same_tables(written):
    md, html = (p.read_text() for p in written[:2])
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|src=", html)
    assert html.count("<table>") == len(re.findall(r"^\| ---", md, re.MULTILINE))
    assert html.count("<svg") == 1 + 2 * 3 + 3
    assert "&lt;code" not in html
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids)), "several studies have figures of one method"
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', html)) <= set(ids)


def test_the_answer_is_three_sentences_from_the_contrasts(folder, page):
    language, images, rest = page.answer
    assert language.startswith("**Language:** grokking as such does not make forgetting easier: generalising does")
    assert images.startswith("**Images:** grokking does not make forgetting easier (digits, cnn: ")
    said = {float(x) for x in re.findall(r"[+-]\d\.\d\d", language)}
    found = {round(c.mean, 2) for h in studied(read_results(folder).language).answer.hypotheses for c in h.contrasts}
    assert said <= found
    assert {min(found), max(found)} <= said
    assert "training until grokking took 5.0 times as much as until `fit`" in rest
    assert "in 3 of 6 studies x methods" in rest


def test_another_effect_makes_another_page(page, tmp_path):
    other = made.content(made.outcomes({"fit": (0.0,) * 3, "easy": (0.0,) * 3}, 6, fit=30))
    after = page_of(made.write(tmp_path, language=other))
    assert "**Language:** grokking does not make forgetting easier" in after
    assert "**Language:** grokking does not make forgetting easier" not in page.answer[0]


def test_what_grokking_costs_is_told_of_every_method_the_declared_ones_first(tmp_path):
    declared = made.primary(methods=["rmu"])
    found = [replace(o, primary=declared) for o in made.outcomes(MORE, 6, fit=30)]
    page = findings(read_results(made.write(tmp_path, language=made.content(found))))
    grids = [grid for part in page.sections for grid in part.grids if grid.title.startswith("From how many requests")]
    assert [row.cells[0] for row in grids[0].rows if row.kind != "section"][:3] == ["rmu", "ga", "npo"]


def test_studies_with_one_answer_share_a_clause(tmp_path):
    def images(first: float, arch: str, seeds: int):
        found = made.outcomes({"fit": (first, first, first), "easy": (0.0,) * 3}, seeds, images=True)
        return made.images(found, arch)

    where = made.write(
        tmp_path, vision_digits_cnn=images(0.0, "cnn", 6), vision_digits_resnet8=images(0.0, "resnet8", 5)
    )
    said = findings(read_results(where)).answer[1]
    number = r"[+-]0\.0\d( to [+-]0\.0\d)?"
    each = [
        ", ".join(f"grok minus {kind} {number} over 3 methods, {n} seeds" for kind in ("fit", "easy")) for n in (6, 5)
    ]
    each = [f"digits, {arch}: {told}" for arch, told in zip(("cnn", "resnet8"), each, strict=True)]
    assert re.fullmatch(rf"\*\*Images:\*\* grokking does not make forgetting easier \({'; '.join(each)}\)\.", said)
    where = made.write(tmp_path, vision_digits_resnet8=images(0.2, "resnet8", 5))
    said = findings(read_results(where)).answer[1]
    assert "grokking does not make forgetting easier (digits, cnn: grok minus fit" in said
    assert (
        "; grokking as such does not make forgetting easier: generalising does, however it came about (digits, " in said
    )


def test_what_is_missing_is_said_with_its_command_and_without_a_number(tmp_path):
    text = page_of(tmp_path)
    for expected in (LANGUAGE, *VISION, LOCAL, PRETRAINED, SIMULATION):
        assert f"| {expected.what} | {expected.name} | {expected.command} |" in text
    prose = re.sub(r"`[^`]*`|^\|.*$|^!.*$|^Commands: .*$|^#.*$", "", text, flags=re.MULTILINE)
    assert set(re.findall(r"\d+", prose)) == {"95"}, "the level of intervals, in legends"
    drawn = re.findall(r">([^<>]*)</text>", findings(read_results(tmp_path)).picture)
    assert not any(re.search(r"\d", label) for label in drawn), "no axis of numbers where nothing was measured"
    assert text.count("| language | – | – | not run | not run | not run |") == 6


def test_each_missing_file_is_told_alone(folder, tmp_path):
    for name in ("language.json", "vision_digits_cnn.json", "local_grokking.json", "pretrained_start.json"):
        part = tmp_path / name
        shutil.copytree(folder, part)
        (part / name).unlink()
        gone = [e.name for e in read_results(part).missing]
        assert set(gone) - {e.name for e in read_results(folder).missing} == {name}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        write_findings(path, path / "out/findings.md", path / "out/f.html")
    assert not (path / "out").exists(), "nothing half-written"
    assert "\n" not in str(error.value)
    return str(error.value)


def broken(**changes):
    return {**made.content(made.outcomes(MORE, 3)), **changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "command: field required"),
        ([1], "file: input should be"),
        (broken(outcomes={"schema_version": 1}), "outcomes.metrics: field required"),
        (broken(trainings=[{"run": "seed0"}]), "trainings.0.phase: field required"),
        (broken(probes=[{"seed": 0, "checkpoint": "fit", "lines": {"x": ["a"]}}]), "probes.0.lines.x.0: "),
        (broken(environment={}), "environment.machine: field required"),
    ],
)
def test_a_malformed_study_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "language.json").write_text(json.dumps(content))
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'language.json'}: {said}")
    assert message.endswith("not the results its name says, make it again")


@pytest.mark.parametrize("spoil", ["short", "place", "version", "uneven", "primary"])
def test_outcomes_that_do_not_fit_together_are_refused(tmp_path, spoil):
    content = broken()
    packed = content["outcomes"]
    if spoil == "short":
        packed["runs"][0]["values"].pop()
    elif spoil == "place":
        packed["runs"][0]["place"] = -1
    elif spoil == "version":
        packed["schema_version"] = 99
    elif spoil == "uneven":
        packed["runs"][0]["trajectory"]["step"].pop()
    else:
        packed["runs"][0]["primary"] = 7
    made.write(tmp_path, language=content)
    assert "language.json: outcomes: " in refused(tmp_path)


def test_a_file_that_is_no_json_or_no_folder(tmp_path):
    (tmp_path / "vision_digits_cnn.json").write_text('{"command": ')
    assert "is no whole JSON" in refused(tmp_path)
    with pytest.raises(UserError, match="no such folder; give the folder of results"):
        read_results(tmp_path / "none")


def test_the_command_writes_and_refuses(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["llm-unlearn", "study", "report", str(folder), "--out", "docs/found.md", "--html", "f.html"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out == "findings: docs/found.md, f.html and 10 figures\n"
    assert (tmp_path / "docs/found/answer.svg").exists()
    monkeypatch.setattr(sys, "argv", ["llm-unlearn", "study", "report", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


def test_a_whole_study_is_reported_in_time(tmp_path):
    found = [
        made.outcome(seed, kind, method, 0.9 + 0.001 * seed, scenario=scenario)
        for seed in range(5) for kind in made.KINDS for method in made.METHODS for scenario in ("author", "a", "b", "c")
    ]  # fmt: skip
    made.write(tmp_path, language=made.content(found), vision_digits_cnn=made.images(found))
    started = time.process_time()
    write_findings(tmp_path, tmp_path / "f.md", tmp_path / "f.html")
    assert time.process_time() - started < 40, "240 runs twice; all of the studies are allowed 120 seconds"


def test_runs_behind_the_primary_are_counted(tmp_path):
    runs = made.outcomes(MORE, 5, fit=50)
    gone = [o for o in runs if (o.checkpoint, o.method, o.seed) != ("fit", "ga", 4)]
    broke = made.outcome(0, "grok", "npo", 0.05)
    gone = [broke if (o.checkpoint, o.method, o.seed) == ("grok", "npo", 0) else o for o in gone]
    made.write(tmp_path, language=made.content(gone, study={**made.content(runs)["study"]}))
    grid = behind(studied(read_results(tmp_path).language))
    by = {row.cells[:2]: row.cells[2:] for row in grid.rows}
    assert by["ga", "fit"] == ("5", "4", "4", "0", "0"), "planned, ended, lost seed, collapsed, at the level"
    assert by["npo", "grok"] == ("5", "5", "none", "1", "5")
    assert by["rmu", "easy"] == ("5", "5", "none", "0", "5")


def test_departures_are_told(tmp_path):
    content = broken(
        designs=["b" * 64 + " with seeds=[0]", "c" * 64], left_out=["post"], censored=["seed3 never reached 'grok'"],
        errors={"seed1 author grok ga": "Diverged: loss"}, cells={"tuning": {}, "measured": {"ok": 3, "failed": 1}},
        tuned=[dict(scenario="author", checkpoint="fit", method="ga", score={"damage": 1}, feasible_trials=0)],
        retrained_otherwise=["easy/seed0"], environments_before=[{"machine": "another"}],
    )  # fmt: skip
    assert "a machine" in (head := told(read_results(made.write(tmp_path, language=content)).language)[1])
    assert "another" in head
    text = " ".join(departures(read_results(made.write(tmp_path, language=content)).language))
    for said in ("Changed on the command line: `seeds=[0]`", "2 designs: bbbbbbbbbbbbbbbb, cccccccccccccccc",
                 "left out: post", "ga (author fit)", "1 checkpoint of single seeds or golds (seed3 never",
                 "seed1 author grok ga (Diverged: loss)", "1 cells failed",
                 "Trained again for further runs, and not the same as before: easy/seed0."):  # fmt: skip
        assert said in text
    assert departures(read_results(made.write(tmp_path, language=broken())).language) == []


def test_where_tuning_found_nothing_is_told_once():
    def row(scenario: str, method: str, feasible: int) -> Tuning:
        return Tuning(
            scenario=scenario, checkpoint="fit", method=method, score={"damage": 0.1}, feasible_trials=feasible
        )

    several = [row("author", "ga", 0), row("author", "npo", 2), row("", "ga", 0)]
    assert infeasible(several) == "ga (author fit)", "not again for all scenarios together"
    assert infeasible([row("", "ga", 0), row("", "npo", 1)]) == "ga (fit)", "a study of one scenario names none"


def test_cost_by_hand(folder):
    file = read_results(folder).language
    outcomes = file.of("author")
    assert training_cost(file.content.trainings, outcomes, "fit", "flops") == dict.fromkeys(range(6), 2e9)
    assert training_cost(file.content.trainings, outcomes, "easy", "cpu_seconds") == dict.fromkeys(range(6), 40.0)
    assert training_ratios(file, "grok", "fit") == [5.0] * 6
    found = paid_back(file, "ga", "grok", "fit", "flops")
    # 800 steps of 1e7 more; level after 20 in place of 30 of 40 updates of 4e9 together
    assert (found.extra, found.saved, found.requests) == (8e9, 1e9, 8.0)
    assert paid_back(file, "ga", "grok", "easy", "flops").requests == np.inf


def test_a_run_that_never_came_to_the_level_costs_its_whole_budget(folder):
    file = read_results(folder).vision[0]
    found = paid_back(file, "ga", "grok", "fit", "cpu_seconds")
    assert (found.saved, found.requests) == (-2.0, np.inf), "4 s of 40 updates against 2 s of 20"


def test_files_without_flops_are_reported_in_seconds(tmp_path):
    content = broken()
    content["trainings"] = [{k: v for k, v in row.items() if k != "flops"} for row in content["trainings"]]
    file = read_results(made.write(tmp_path, language=content)).language
    assert paid_back(file, "ga", "grok", "fit", "flops") is None
    assert training_ratios(file, "grok", "fit") == [5.0] * 3


def test_probe_claims_are_judged_as_those_of_runs(folder):
    file = read_results(folder).vision[0]
    judged = {(j.claim.topic, j.baseline): j for j in probe_claims(file.content.probes, "cnn")}
    alignment = judged["gradient alignment", "fit"]
    at = {(r.seed, r.checkpoint): r.lines["alignment, ce: cos(all forget, all retain)"][0] for r in file.content.probes}
    assert alignment.effect.mean == pytest.approx(np.mean([at[s, "fit"] - at[s, "grok"] for s in range(6)]))
    assert (alignment.verdict, alignment.claim.published) == ("holds", pytest.approx(0.990 - 0.521))
    assert judged["complexity", "early"].effect.mean == pytest.approx(np.log(20 / 8), abs=0.05)
    assert judged["CKA", "easy"].claim.published is None, "the paper gives none for a CNN"
    assert {j.verdict for j in probe_claims(file.content.probes[:8], "cnn")} == {"cannot tell"}, "two seeds"


def test_probes_stand_beside_nulls_and_published_values(folder):
    (grid,) = probe_grids(read_results(folder).vision[0].content.probes, "cnn", "grok")
    row = next(r.cells for r in grid.rows if r.cells[0].startswith("alignment"))
    assert row[-1] == "0.990 -> 0.521"
    assert all("; null 0.1 to 0.9" in cell for cell in row[1:5])


def test_local_grokking_is_judged_both_ways(folder):
    lines = [line.model_dump() for line in read_results(folder).local["local_grokking.json"].lines]
    published, matched = (local_claims(lines, way) for way in ("as_published", "matched"))
    assert [j.verdict for j in published] == ["holds", "does not hold"]
    assert [j.verdict for j in matched] == ["does not hold", "cannot tell"]
    assert published[0].effect.mean == pytest.approx(np.mean([0.2, 0.18, 0.19, 0.22]))


def test_local_grokking_says_who_was_drawn_and_what_could_not_be(folder):
    page = findings(read_results(folder))
    text = " ".join(next(s for s in page.sections if s.title == "Local grokking on TOFU").text)
    assert "by less than 0.03 from epoch 18 to 40 (197 questions)" in text
    assert "by more than 0.3 (291); 98 pairs match" in text
    assert "Not drawn: 150 matched: there are 98" in text


def test_secondary_outcomes_stand_beside_gold_and_doing_nothing(folder):
    outcomes = read_results(folder).language.of("author")
    grid = secondary_grid(outcomes, ("fit", "grok"), [("grok", "fit")])
    heads = [row.cells[0] for row in grid.rows if row.kind == "section"]
    assert any(head.startswith("indirect") for head in heads)
    assert any(head.startswith("relearning") for head in heads)
    first = grid.rows[heads.index("distance to gold on forgotten questions (less is better)") + 1].cells
    mean = np.mean([o.number("forget_acc~gold") for o in outcomes if (o.method, o.checkpoint) == ("ga", "fit")])
    assert first[1] == f"{mean:.2f} (0.80)"
    inferred = levels_grid({"author": outcomes, "none": []}, ("fit", "sam", "grok"))
    ga = next(row for row in inferred.rows if row.cells[0] == "ga").cells
    mean = np.mean([o.number("forget_inf_acc") for o in outcomes if (o.method, o.checkpoint) == ("ga", "fit")])
    assert ga[1:3] == (f"{mean:.2f} (0.05; 0.80)", DASH), "no run from sam"
    assert [row.cells for row in inferred.rows if row.kind == "section"] == [("author",)]
    assert levels_grid({"author": outcomes}, ("sam",)) is None
    everywhere = requests_grid({"author": outcomes}, [("grok", "fit")])
    assert everywhere.rows[1].cells[1].startswith("+0.1")


def test_a_method_stands_beside_gold_of_its_own_seeds():
    def run(seed: int, method: str):
        plain = made.outcome(seed, "fit", method, 0.9, reach=20)
        line = {**plain.metrics["forget_inf_acc"], "gold": 0.1 * seed, "start": 0.5 + 0.1 * seed}
        return replace(plain, metrics={**plain.metrics, "forget_inf_acc": line})

    runs = [run(seed, "ga") for seed in range(2)] + [run(seed, "npo") for seed in range(4)]
    grid = levels_grid({"author": runs}, ("fit",))
    beside = {row.cells[0]: row.cells[1].partition(" ")[2] for row in grid.rows[1:]}
    assert beside == {"ga": "(0.05; 0.55)", "npo": "(0.15; 0.65)"}


def test_who_came_to_the_level_is_counted_for_every_request_beside_what_all_runs_keep():
    short = {("npo", 1): 50, ("npo", 2): 50}  # seeds that never come to it
    runs = [made.outcome(seed, "grok", m, 0.7 + 0.1 * seed, reach=short.get((m, seed), 20))
            for m in ("ga", "npo") for seed in range(3)]  # fmt: skip
    grid = reached_grid({"author": runs, "fact": runs[:1], "none": []}, ("fit", "grok"))
    assert [row.cells for row in grid.rows] == [
        ("author",), ("ga", DASH, "3 of 3; 0.80"), ("npo", DASH, "1 of 3; 0.80"),
        ("fact",), ("ga", DASH, "1 of 1; 0.70"),
    ]  # fmt: skip
    assert reached_grid({"author": runs}, ("fit",)) is None


def test_a_claim_that_the_design_decides_is_not_counted(folder, page):
    found = [j for f in read_results(folder).studies for j in studied(f).claims if j.baseline == "fit"]
    judged = [j for j in found if j.why != BY_DESIGN]
    assert len(judged) < len(found)
    assert f"of {len(judged)} judged beside the memorised checkpoint" in page.answer[2]


def test_the_committed_page_is_of_the_committed_results(tmp_path):
    write_findings(RESULTS, tmp_path / "findings.md", tmp_path / "f.html")
    assert (tmp_path / "findings.md").read_text() == (ROOT / "docs/findings.md").read_text(), (
        "results changed: run llm-unlearn study report"
    )


def test_committed_results_name_no_folder_of_the_machine_that_made_them():
    lasting = r"/(?:usr|etc|proc|sys|dev|disk|nowhere)/"  # of any machine, or made up by the trials of bad inputs
    told = {path.name: re.findall(r"(?<![\w./:\]-])/[A-Za-z][\w.-]*/[^\s\"]*", path.read_text())
            for path in RESULTS.glob("*.json")}  # fmt: skip
    found = {name: [p for p in paths if not re.match(lasting, p)] for name, paths in told.items()}
    assert not {name: paths[:3] for name, paths in found.items() if paths}


def test_the_readme_opens_with_the_answer():
    opening = (ROOT / "README.md").read_text().partition("\n## ")[0]
    for sentence in findings(read_results(RESULTS)).answer:
        assert printable(sentence) in opening, "results changed: copy the answer of docs/findings.md"
    assert "(docs/findings/answer.svg)" in opening
