from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.compare import MAIN
from llm_unlearn.grok.detector import GROKKED, KINDS
from llm_unlearn.report.collect import missing_kinds, paired, report_data
from llm_unlearn.report.html import render, write_report

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><h1>x</h1>",
    "{{ 7 * 7 }}",
    "{% raw %}{# x #}",
    "\" onmouseover=\"x' y='z",
    "<!-- --><img src=https://example.org/x onerror=alert(1)>",
    "&lt;b&gt; &amp; ]]> <svg/onload=x>",
    "\x00\x1b[31m\u202eevil\ud800",
]


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def study_folder(tmp_path, make_outcome, outcome_folder, grok_folder):
    def build(name, kinds=("fit", "grok"), seeds=(0,), methods=("ga", "npo"), grokked=True, **kwargs):
        root = tmp_path / name
        for seed in seeds:
            grok_folder(root / f"seed{seed}", seed=seed, grokked=grokked)
            grok_folder(root / f"seed{seed}-gold", seed=seed, gold=True, grokked=grokked)
            for kind in kinds:
                for i, method in enumerate(methods):
                    run = make_outcome(method, kind, seed, **kwargs)
                    outcome_folder(root / f"seed{seed}" / "unlearn" / kind / str(i), run)
        return root

    return build


def visible(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def test_page_is_self_contained(study_folder, tmp_path):
    out = write_report([study_folder("s")], tmp_path / "deep" / "report.html")
    text = out.read_text()
    page = Page(text)
    (policy,) = [value for name, value in page.attributes if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    assert not any(name.startswith("on") for name, _ in page.attributes)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_model_text_is_only_ever_text(study_folder, make_answers, hostile):
    small = {"kinds": ("fit",), "methods": ("npo",)}
    clean = Page(render(report_data([study_folder("clean", **small, texts=make_answers(after="x"))])))
    text = render(report_data([study_folder("hostile", **small, texts=make_answers(after=hostile))]))
    page = Page(text)
    assert page.tags == clean.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in clean.attributes]
    shown = re.sub("[\x00\x1b\u202e\ud800]", "\ufffd", hostile)
    assert visible(page).count(" ".join(shown.split())) == 6
    assert text.encode()  # a lone surrogate could not be written


def test_names_in_a_study_are_only_ever_text(study_folder):
    clean = Page(render(report_data([study_folder("clean", methods=("ga", "npo"))])))
    page = Page(render(report_data([study_folder("hostile", methods=('<b onclick="x">', "npo"))])))
    assert "b" not in page.tags
    assert "onclick" not in [name for name, _ in page.attributes]
    assert set(page.tags) == set(clean.tags)
    assert '<b onclick="x">' in visible(page)


def test_curves_alone_are_a_report(tmp_path, grok_folder):
    grok_folder(tmp_path / "runs" / "a", grokked=False)
    text = visible(Page(render(report_data([tmp_path]))))
    assert "No unlearning run has been evaluated yet" in text
    assert "not in 1,600" in text
    assert "memorised (not grokked)" in text
    assert "Before and after" not in text


def test_outcomes_alone_are_a_report(tmp_path, make_outcome, outcome_folder):
    outcome_folder(tmp_path / "a", make_outcome())
    text = visible(Page(render(report_data([tmp_path]))))
    assert "Unlearning from fit" in text
    assert "Training" not in text


def test_nothing_found_is_the_user_s_error(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no such folder"):
        report_data([tmp_path / "missing"])
    assert not (tmp_path / "report.html").exists()


def test_broken_record_names_the_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is no whole JSON"):
        report_data([tmp_path])


def test_page_shows_what_the_methods_are_and_how_they_were_set(study_folder):
    text = visible(Page(render(report_data([study_folder("s")]))))
    assert "-(2/beta) mean_B log sigmoid(-beta log p/p_ref(forget))" in text
    assert "arXiv:2404.05868" in text
    assert "optim.lr 0.001" in text


def test_config_does_not_tell_where_the_files_lie(study_folder):
    root = study_folder("s")
    text = render(report_data([root]))
    assert str(root.resolve()) not in text
    assert "out: seed0" in visible(Page(text))


def test_config_does_not_tell_where_other_files_lie(study_folder):
    root = study_folder("s")
    for config in root.rglob("config.yaml"):
        config.write_text("data:\n  path: '/home/me/my papers/tofu'\nmodel: /home/me/runs/x@grok\nlr: 1/2/3\n")
    texts = set(report_data([root]).configs.values())
    assert texts == {"data:\n  path: '.../tofu'\nmodel: .../x@grok\nlr: 1/2/3\n"}


def test_data_pairs_gold_and_names_missing_kinds(study_folder):
    data = report_data([study_folder("s", kinds=("fit",), seeds=(0, 1))])
    assert [(run.name, gold.name) for run, gold in paired(data.runs) if run and gold] == [
        ("seed0", "seed0-gold"),
        ("seed1", "seed1-gold"),
    ]
    assert missing_kinds(data) == ("early", "grok", "post")
    assert len(data.runs[0].curve) == 7  # the torn last line is left out


def test_the_same_folder_given_twice_counts_once(tmp_path, grok_folder):
    grok_folder(tmp_path / "a")
    assert len(report_data([tmp_path, tmp_path / "a"]).runs) == 1


def test_failed_cells_are_told_unless_mended(study_folder):
    root = study_folder("s")
    (root / "cells").mkdir()
    for i, (label, status) in enumerate(
        (("seed0 fit ga", "failed"), ("seed0 fit ga", "ok"), ("seed0 fit kl", "failed"))
    ):
        record = {"label": label, "status": status, "environment": {"machine": "m1", "versions": {"torch": "2"}}}
        (root / "cells" / f"{i}.json").write_text(json.dumps(record))
    data = report_data([root])
    assert data.failed == ("seed0 fit kl",)
    text = visible(Page(render(data)))
    assert "1 cell of the study failed" in text
    assert "machine m1 torch 2" in text


def test_a_torn_results_file_is_no_report_of_curves_alone(study_folder):
    root = study_folder("s", kinds=("fit",), methods=("npo",))
    (torn,) = root.rglob("results.json")
    torn.write_text(torn.read_text()[:-9])
    with pytest.raises(UserError, match=r"results\.json: is no whole JSON"):
        report_data([root])


def test_marks_and_phases_are_the_detector_s(tmp_path, grok_folder):
    own = [kind for kind in MAIN if kind not in ("fit_scaled", "fit_normed")]
    assert list(KINDS) == own, "compare cannot import the detector, so only this keeps them the same"
    grok_folder(tmp_path / "a")
    (run,) = report_data([tmp_path]).runs
    assert run.marks == {"early": 100, "fit": 200, "grok": 800, "post": 1600}
    phases = {phase: replace(run, report={**run.report, "phase": phase}).grokked for phase in (*GROKKED, "semi-grok")}
    assert phases == {"grok-weak": True, "grok": True, "grok-strong": True, "semi-grok": False}
