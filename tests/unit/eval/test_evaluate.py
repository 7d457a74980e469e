"""Evaluation of a saved model: what results hold, when a model is run again, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_unlearn.data.splits import Scenario, draw_request
from llm_unlearn.errors import UserError
from llm_unlearn.eval import score as module
from llm_unlearn.eval.compute import N_BOOT, compute
from llm_unlearn.eval.evaluate import evaluate
from llm_unlearn.eval.metrics.base import make_record
from llm_unlearn.eval.records import read_records
from llm_unlearn.eval.sources import RecordSource
from llm_unlearn.eval.suite import Suite, SuiteConfig, load_suite
from llm_unlearn.models.tiny import SIZES, build_tiny
from llm_unlearn.resampling import cluster_bootstrap
from llm_unlearn.train.snapshot import save_model

score = functools.partial(module.score_model, fmt="auto")
VERSUS = ("forget_quality", "forget_ks", "forget_effect_size", "forget_kl_to_gold")
LINE = {"metric", "split", "unit", "direction", "ci", "value", "n", "gold", "start"}


def save(folder, tokenizer, seed):
    torch.manual_seed(seed)
    lm = build_tiny(SIZES["nano"], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.no_grad():
        for weight in lm.parameters():  # larger than at birth, so that answers differ from one another
            weight.mul_(3)
    return str(save_model(folder, lm, tokenizer, {"kind": "grok"}))


@pytest.fixture(scope="module")
def suite():
    return load_suite("tofu_world")


@pytest.fixture(scope="module")
def case(tiny_world):
    return tiny_world, draw_request(tiny_world, Scenario(size=2))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    runs = tmp_path_factory.mktemp("runs")
    return {name: save(runs / name, tiny_tokenizer, seed) for seed, name in enumerate(("model", "gold", "start"))}


@pytest.fixture(scope="module")
def result(models, suite, case):
    run = {"method": "npo", "seed": 3}
    return evaluate(models["model"], suite, *case, gold=models["gold"], start=models["start"], run=run)


@pytest.fixture
def no_model(monkeypatch):
    class ModelWasRun(Exception):
        pass

    def refuse(*_args, **_kwargs):
        raise ModelWasRun

    monkeypatch.setattr(module, "score_split", refuse)
    return ModelWasRun


def one_metric(metric: str, split: str = "forget") -> Suite:
    return Suite(SuiteConfig(name="one", metrics={"it": {"metric": metric, "split": split}}))  # pyright: ignore


def test_results_hold_every_number_beside_gold_and_start(result, suite, models, case):
    folder = Path(result["folder"])
    assert folder.parent == Path(models["model"]).parent, "results go beside a model of ours"
    on_disk = json.loads((folder / "results.json").read_text())
    assert on_disk == {key: value for key, value in result.items() if key != "folder"}
    assert set(on_disk) == {
        "schema_version", "model", "suite", "reference", "run", "metrics", "identity", "cost", "answers", "collapse",
        "data", "reference_identity",
    }  # fmt: skip
    assert on_disk["run"] == {"method": "npo", "seed": 3}
    assert set(result["metrics"]) == set(suite.config.metrics)
    assert all(set(line) == LINE for line in result["metrics"].values())
    alone = {name: evaluate(models[name], suite, *case, gold=models["gold"])["metrics"] for name in ("gold", "start")}
    for name, line in result["metrics"].items():
        assert line["gold"] == alone["gold"][name]["value"]
        assert line["start"] == alone["start"][name]["value"]
    forget = read_records(folder / "records.parquet")["forget"]
    by_hand = np.mean([np.exp(r.scored.logp.mean()) for r in forget])
    assert result["metrics"]["forget_Q_A_Prob"]["value"] == pytest.approx(by_hand, rel=1e-12)
    assert result["metrics"]["forget_Q_A_Prob"]["n"] == len(forget)
    assert set(result["answers"]) == {"after", "gold", "start"}
    assert [a["split"] for a in result["answers"]["after"]] == ["forget"] * 3 + ["retain"] * 3


def test_gold_against_itself_is_perfect(models, suite, case):
    metrics = evaluate(models["gold"], suite, *case, gold=models["gold"])["metrics"]
    assert metrics["forget_quality"]["value"] == 1.0
    assert metrics["forget_ks"]["value"] == 0.0
    assert metrics["forget_effect_size"]["value"] == 0.0
    assert all(line["value"] == line["gold"] for line in metrics.values())


def test_without_gold_what_needs_it_is_null(result, models, suite, case, tmp_path):
    metrics = evaluate(models["model"], suite, *case, out=tmp_path / "alone")["metrics"]
    assert {name for name, line in metrics.items() if line["value"] is None} == set(VERSUS)
    for name in set(metrics) - set(VERSUS):
        assert "gold" not in metrics[name]
        assert metrics[name]["value"] == result["metrics"][name]["value"]


def test_a_second_call_runs_no_model(result, models, suite, case, no_model):
    again = evaluate(
        models["model"], suite, *case, gold=models["gold"], start=models["start"], run={"method": "npo", "seed": 3}
    )
    assert again == result


def test_a_change_in_place_is_scored_again(result, models, suite, case, tiny_tokenizer, tmp_path, no_model):
    model = shutil.copytree(models["model"], tmp_path / "model")
    shutil.copytree(result["folder"], tmp_path / "known")
    score(str(model), suite, *case, out=tmp_path / "known")  # the same content elsewhere is the same model
    stamp = tmp_path / "known/identity.json"
    stamp.write_text(stamp.read_text().replace(models["model"], str(model)))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(no_model):
        score(str(model), suite, *case, out=tmp_path / "known")
    (model / "chat_template.jinja").unlink()
    save(model, tiny_tokenizer, 9)
    with pytest.raises(no_model):
        score(str(model), suite, *case, out=tmp_path / "known")


def test_results_of_anything_else_are_not_written_over(result, models, suite, case, tmp_path, no_model):
    before = {path.name: path.read_bytes() for path in Path(result["folder"]).iterdir()}
    other = draw_request(case[0], Scenario(size=3))
    for model, chosen, drawn, differing in (
        ("gold", suite, case[1], "model"),
        ("model", suite, other, "rows"),
        ("model", load_suite("quick"), case[1], "rows and suite"),
    ):
        with pytest.raises(UserError, match=f"holds results of another {differing}; choose another --out"):
            score(models[model], chosen, case[0], drawn, out=Path(result["folder"]))
    for folder in (Path(models["gold"]), Path(models["gold"]).parent):
        with pytest.raises(UserError, match="holds something else than results"):
            score(models["model"], suite, *case, out=folder)
    assert before == {path.name: path.read_bytes() for path in Path(result["folder"]).iterdir()}


def test_without_a_reference_the_last_one_judges(result, models, suite, case, caplog):
    with caplog.at_level("INFO", logger="llm_unlearn"):
        again = evaluate(models["model"], suite, *case)
    assert again["reference"] == result["reference"] == models["gold"]
    assert again["metrics"]["forget_ks"]["value"] == result["metrics"]["forget_ks"]["value"]
    assert f"reference: {models['gold']}, as in the last evaluation" in caplog.text


def test_records_of_a_killed_evaluation_never_pass_for_another_models(models, case, tmp_path, monkeypatch):
    quick = one_metric("probability")
    args, model = (quick, *case), shutil.copytree(models["model"], tmp_path / "model")
    first = score(str(model), *args, out=tmp_path / "r")
    for file in Path(models["gold"]).iterdir():
        shutil.copy(file, model)
    write = module.write_atomic

    def killed(path, data):
        if path.name == "identity.json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        score(str(model), *args, out=tmp_path / "r")
    monkeypatch.undo()
    for file in Path(models["model"]).iterdir():
        shutil.copy(file, model)
    again = score(str(model), *args, out=tmp_path / "r")
    pairs = zip(again.records["forget"], first.records["forget"], strict=True)
    assert all(np.array_equal(a.scored.logp, b.scored.logp) for a, b in pairs)


def test_a_reference_with_other_rows_is_refused(result, models, suite, case):
    mine = score(models["model"], suite, *case).records
    gold = score(models["gold"], suite, *case).records
    assert (
        compute(suite, RecordSource(mine), RecordSource(gold))["forget_ks"]["value"]
        == result["metrics"]["forget_ks"]["value"]
    )
    changed = dataclasses.replace(gold["forget"][0], answer="another")
    for forget in (gold["forget"][1:], gold["forget"][::-1], [changed, *gold["forget"][1:]]):
        with pytest.raises(UserError, match="gold has (19|other) rows"):
            compute(suite, RecordSource(mine), RecordSource({**gold, "forget": forget}, "gold"))


def test_a_split_the_data_lacks_is_named(models, case):
    with pytest.raises(UserError, match="reads split 'nowhere', which this data does not have"):
        score(models["model"], one_metric("probability", "nowhere"), *case)


def test_rows_without_what_a_metric_reads_are_one_line():
    with pytest.raises(UserError, match="truth_ratio on 'forget': record 0 has no perturbed answers.*another suite"):
        compute(one_metric("truth_ratio"), RecordSource({"forget": [make_record()]}))


def test_data_without_wrong_answers_is_refused_before_a_model_runs(models, case, tmp_path, no_model):
    corpus, request = case
    rows = tuple(dataclasses.replace(row, perturbed_answer=()) for row in corpus.split("train"))
    bare = dataclasses.replace(corpus, splits={"train": rows})
    with pytest.raises(UserError, match="it: row 1 of 'forget' has no perturbed answers, which truth_ratio reads"):
        evaluate(models["model"], one_metric("truth_ratio"), bare, request, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(no_model):  # what reads paraphrases alone is none of these
        evaluate(models["model"], one_metric("probability_paraphrase"), bare, request, out=tmp_path / "r")


def test_intervals_resample_authors():
    # every author's items are alike, so resampling items one by one would give an interval far too narrow
    logs = [("a", -0.1), ("b", -1.0), ("c", -2.0)]
    records = [make_record(i, logp=[logp], author=author) for i in range(20) for author, logp in logs]
    line = compute(one_metric("probability"), RecordSource({"forget": records}))["it"]
    p = [float(np.exp(r.scored.logp[0])) for r in records]
    wanted = cluster_bootstrap(p, [r.author for r in records], n_boot=N_BOOT)
    assert line["ci"] == [wanted.lo, wanted.hi]
    assert line["ci"][0] < line["value"] < line["ci"][1]
    spread = np.std(np.exp([-0.1, -1.0, -2.0]), ddof=1) / 3**0.5
    assert line["ci"][1] - line["ci"][0] > 2 * 1.96 * spread, "of three authors, not of sixty items"
    one_author = compute(one_metric("probability"), RecordSource({"forget": [r for r in records if r.author == "a"]}))[
        "it"
    ]
    assert one_author["ci"] is None


def test_an_attack_set_against_gold_s_has_a_paired_interval():
    def source(shift: float) -> RecordSource:
        rng = np.random.default_rng(0)
        return RecordSource({
            split: [make_record(i, logp=list(-rng.random(6) - (split == "holdout") * shift), author=f"{split}{i % 8}")
                    for i in range(48)] for split in ("forget", "holdout")})  # fmt: skip

    entry = {"metric": "privleak", "split": "forget", "against": "holdout"}
    suite = Suite(SuiteConfig(name="one", metrics={"it": entry}))  # pyright: ignore
    assert compute(suite, source(0.1), source(0.1))["it"]["ci"] == [0, 0], "what is like gold is so in every draw"
    line = compute(suite, source(0.3), source(0.0))["it"]
    assert -100 < line["ci"][0] < line["value"] < line["ci"][1] < 0
    # two authors a side: in some draws gold tells all, and a share of nothing has no bounds
    levels = {"forget": (-1.0, -3.0), "holdout": (-2.2, -2.3)}
    records = {split: [make_record(i, logp=[x] * 3, author=f"{split}{i}") for i, x in enumerate(of)]
               for split, of in levels.items()}  # fmt: skip
    few = compute(suite, RecordSource(records), RecordSource(records))["it"]
    assert (few["value"], few["ci"]) == (0, None)


def test_the_intervals_of_results_contain_their_values(result):
    lines = [line for line in result["metrics"].values() if line["ci"] is not None]
    assert len(lines) > 10
    assert all(line["ci"][0] <= line["value"] <= line["ci"][1] for line in lines)
    assert "model_utility" in {line["metric"] for line in lines}


def test_the_rows_asked_are_part_of_what_identifies_records(models, case, tmp_path, monkeypatch, request):
    world, drawn = case
    neutral, kept = one_metric("probability", "real_authors"), one_metric("probability", "retain")
    for suite in (neutral, kept):
        score(models["model"], suite, world, drawn, out=tmp_path / suite.config.metrics["it"].split)
    before = (tmp_path / "retain/records.parquet").read_bytes()
    no_model = request.getfixturevalue("no_model")
    other = draw_request(world, Scenario(size=3))
    score(models["model"], neutral, world, other, out=tmp_path / "real_authors")  # the same rows for any request
    with pytest.raises(UserError, match="results of another rows"):
        score(models["model"], kept, world, other, out=tmp_path / "retain")
    with pytest.raises(no_model):
        score(models["model"], kept, world, other)
    assert (tmp_path / "retain/records.parquet").read_bytes() == before
    asked = module.eval_splits
    monkeypatch.setattr(module, "eval_splits", lambda *a: {**asked(*a), "real_authors": asked(*a)["real_authors"][1:]})
    with pytest.raises(no_model):
        score(models["model"], neutral, world, drawn)


@pytest.mark.parametrize("torn", ["stamp", "empty stamp", "another shape", "records", "no records"])
def test_torn_results_are_scored_again(torn, models, case, tmp_path, caplog):
    args = (models["model"], one_metric("probability"), *case)
    whole = score(*args, out=tmp_path)
    stamp, records = tmp_path / "identity.json", tmp_path / "records.parquet"
    if torn in ("stamp", "records"):
        file = stamp if torn == "stamp" else records
        file.write_bytes(file.read_bytes()[:50])
    elif torn == "no records":
        records.unlink()
    else:
        stamp.write_text("{}" if torn == "empty stamp" else '["model"]')
    again = score(*args, out=tmp_path)
    assert "not whole, scored again" in caplog.text
    assert read_records(records).keys() == whole.records.keys()
    assert again.identity == whole.identity == json.loads(stamp.read_text())["identity"]


def test_progress_counts_every_row(models, case, tmp_path, monkeypatch):
    bars = []

    @contextmanager
    def recorded(*args, **kwargs):
        with progress(*args, **kwargs) as bar:
            bars.append(bar)
            yield bar

    progress = module.progress
    monkeypatch.setattr(module, "progress", recorded)
    suite = load_suite("quick")
    records = score(models["model"], suite, *case, out=tmp_path).records
    (bar,) = bars
    assert set(records) == {"forget", "retain"}
    assert bar.done == bar.total == sum(map(len, records.values())) > 0


def test_a_killed_evaluation_goes_on_with_the_next_split(models, case, tmp_path, monkeypatch):
    suite, whole = load_suite("quick"), score(models["model"], load_suite("quick"), *case, out=tmp_path / "whole")
    scored = []

    def killed(*args, **kwargs):
        if scored:
            raise KeyboardInterrupt
        scored.append(1)
        return really(*args, **kwargs)

    really = module.score_split
    monkeypatch.setattr(module, "score_split", killed)
    with pytest.raises(KeyboardInterrupt):
        score(models["model"], suite, *case, out=tmp_path / "r")
    assert [p.name for p in (tmp_path / "r").iterdir() if not p.name.startswith(".")] == []
    monkeypatch.setattr(module, "score_split", lambda *a, **k: scored.append(1) or really(*a, **k))
    again = score(models["model"], suite, *case, out=tmp_path / "r")
    assert len(scored) == 2, "the split that was done is not run again"
    assert (tmp_path / "r/records.parquet").read_bytes() == (tmp_path / "whole/records.parquet").read_bytes()
    assert again.cost["forward_tokens"] == whole.cost["forward_tokens"], "what the killed call spent counts"
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"records.parquet", "identity.json"}


def test_two_processes_may_score_one_model_at_a_time(models, case, tmp_path, monkeypatch):
    """Cells of a study share a gold: the first to be done takes the parts away while the other still writes its own."""
    suite, out = load_suite("quick"), tmp_path / "r"
    write = module.write_records

    def overtaken(path, records):
        if path.parent.name.startswith(".parts"):
            monkeypatch.setattr(module, "write_records", write)
            score(models["model"], suite, *case, out=out)
            raise UserError(f"{path}: cannot write: No such file or directory")
        write(path, records)

    monkeypatch.setattr(module, "write_records", overtaken)
    scored = score(models["model"], suite, *case, out=out)
    assert {p.name for p in out.iterdir()} == {"records.parquet", "identity.json"}
    assert len(read_records(out / "records.parquet")["forget"]) == len(scored.records["forget"])


def test_a_torn_part_is_scored_again(models, case, tmp_path, monkeypatch):
    suite = load_suite("quick")
    whole = score(models["model"], suite, *case, out=tmp_path / "whole")
    write = module.write_records
    monkeypatch.setattr(module, "write_records", lambda path, r: write(path, r) if "parts" in str(path) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(models["model"], suite, *case, out=tmp_path / "r")
    monkeypatch.undo()
    for part in (tmp_path / "r").rglob("forget.parquet"):
        part.write_bytes(part.read_bytes()[:40])
    again = score(models["model"], suite, *case, out=tmp_path / "r")
    assert [r.question for r in again.records["forget"]] == [r.question for r in whole.records["forget"]]


def test_cost_counts_what_the_model_was_fed(models, case, tmp_path):
    cost = score(models["model"], one_metric("probability"), *case, out=tmp_path / "a").cost
    assert set(cost) == {"seconds", "cpu_seconds", "peak_bytes", "forward_tokens", "generated_tokens"}
    assert cost["generated_tokens"] == 0 < cost["forward_tokens"]
    assert cost["peak_bytes"] > 1e7
    generated = score(models["model"], one_metric("accuracy"), *case, out=tmp_path / "b").cost
    assert 0 < generated["generated_tokens"] < generated["forward_tokens"]


def test_a_row_without_an_author_is_a_cluster_whatever_process_scores_it(case, monkeypatch):
    from dataclasses import replace

    rows = [replace(row, author="") for row in case[0].split("train")[:7]]
    wanted = module._needed({"forget": rows}, "forget", one_metric("probability"))
    assert [row.author for row in wanted] == list("0123456")
    assert [row.author for row in module.Shard(1, 3).mine(wanted)] == ["1", "4"]


def test_pairs_of_other_weights_are_scored_again(models, case, tmp_path):
    suite = Suite(SuiteConfig(name="kl", metrics={"kl": {"metric": "kl_to_gold", "split": "forget"}}))  # pyright: ignore
    value = evaluate(models["model"], suite, *case, gold=models["gold"], out=tmp_path / "r")["metrics"]["kl"]["value"]
    assert value > 0
    pairs = tmp_path / "r/pairs.json"
    known = json.loads(pairs.read_text())
    known["scores"]["forget/kl_to_gold"] = [9.0] * len(known["scores"]["forget/kl_to_gold"])
    pairs.write_text(json.dumps(known))
    again = evaluate(models["model"], suite, *case, gold=models["gold"], out=tmp_path / "r")
    assert again["metrics"]["kl"]["value"] == 9.0, "what is known of these two is read"
    other = evaluate(models["model"], suite, *case, gold=models["start"], out=tmp_path / "r")
    assert other["metrics"]["kl"]["value"] != 9.0
    assert other["reference_identity"] != again["reference_identity"]


def test_a_gold_that_is_gone_or_of_other_weights_judges_nothing(models, case, tmp_path, tiny_tokenizer, caplog):
    gold, quick = shutil.copytree(models["gold"], tmp_path / "gold"), load_suite("quick")
    model = shutil.copytree(models["model"], tmp_path / "model")
    assert evaluate(str(model), quick, *case, gold=str(gold), out=tmp_path / "r")["reference"] == str(gold)
    save(model, tiny_tokenizer, 9)
    assert evaluate(str(model), quick, *case, out=tmp_path / "r")["reference"] is None, "results of the old weights"
    evaluate(str(model), quick, *case, gold=str(gold), out=tmp_path / "r")
    shutil.rmtree(gold)
    assert evaluate(str(model), quick, *case, out=tmp_path / "r")["reference"] is None
    assert "is gone" in caplog.text
