"""The watch: publishes the kinds with the weights of their steps, and a killed run writes the same curve."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.data.splits import Scenario
from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.base import Scored
from llm_unlearn.grok import run as run_module
from llm_unlearn.grok import watch as module
from llm_unlearn.grok.config import GrokConfig, GrokfastConfig, WatchConfig
from llm_unlearn.grok.detector import detect
from llm_unlearn.grok.run import chance, train_grok
from llm_unlearn.grok.watch import GrokWatch, Probe
from llm_unlearn.models.lora import LoraConfig
from llm_unlearn.models.pretrained import ModelConfig, load_model, read_origin
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.statefile import load_state

# step, train accuracy, held-out accuracy, held-out loss: memorises at 30, dips lowest in loss at 20, jumps at 100
CURVE = [
    (10, 0.5, 0.1, 3.0), (20, 0.9, 0.2, 2.0), (30, 1.0, 0.2, 2.5), (40, 1.0, 0.2, 4.0), (50, 1.0, 0.3, 5.0),
    (60, 1.0, 0.3, 6.0), (70, 1.0, 0.4, 5.0), (80, 1.0, 0.6, 4.0), (90, 1.0, 0.8, 1.0), (100, 1.0, 1.0, 0.1),
    (110, 1.0, 1.0, 0.1), (120, 1.0, 1.0, 0.1), (130, 1.0, 1.0, 0.1), (140, 1.0, 1.0, 0.1), (150, 1.0, 1.0, 0.1),
    (160, 1.0, 1.0, 0.1), (170, 1.0, 1.0, 0.1), (180, 1.0, 1.0, 0.1), (190, 1.0, 1.0, 0.1), (200, 1.0, 1.0, 0.1),
]  # fmt: skip
KINDS = {"early": 20, "fit": 30, "grok": 150, "post": 200}


class Play:
    """A run whose scores follow the curve above, and whose first weight is the step."""

    def __init__(self, monkeypatch, lm, tokenizer, out, until="post") -> None:
        self.lm, self.out, self.curve = lm, out, CURVE
        items = [SimpleNamespace(split=name, ids=[0, 0], n_inputs=1) for name in ("train", "held_out")]
        facts = [("a.x",)] * 5 + [("a.y",)] * 5
        probes = {
            "train": Probe([items[0]] * 10, 0.0, facts),  # type: ignore[list-item]
            "held_out": Probe([items[1]] * 10, 0.0, facts),  # type: ignore[list-item]
        }
        self.watch = GrokWatch(WatchConfig(first=10, until=until), 200, probes, out, tokenizer, {"who": "test"})
        self.run = SimpleNamespace(
            interruptible=nullcontext,
            step=0, model=self, answer_model=self, lm=lm, seconds=0.0, stop_reason=None,
            accelerator=SimpleNamespace(
                is_main_process=True, wait_for_everyone=lambda: None, distributed_type=DistributedType.NO
            ),
        )  # fmt: skip
        monkeypatch.setattr(module, "score_answers", lambda model, items: model.scores(items))

    def scores(self, items):
        _, train, held_out, loss = next(point for point in self.curve if point[0] == self.run.step)
        accuracy = train if items[0].split == "train" else held_out
        return [
            Scored(np.full(2, -loss), np.full(2, i < round(accuracy * len(items))), True) for i in range(len(items))
        ]

    def go(self, start=1, stop=200):
        for step in range(start, stop + 1):
            self.run.step = step
            with torch.no_grad():
                self.lm.lm_head.weight[0, 0] = step
            self.watch(self.run)
            if self.run.stop_reason:
                break
        return self.run


def step_of(folder) -> int:
    return int(load_model(str(folder)).lm_head.weight[0, 0])


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """What is on disk after a power cut is test_checkpoint's business; here it only takes time."""
    monkeypatch.setattr("llm_unlearn.train.checkpoint._fsync", lambda path: None)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def play(monkeypatch, make_lm, tiny_tokenizer, tmp_path):
    return lambda name="run", **more: Play(monkeypatch, make_lm(), tiny_tokenizer, tmp_path / name, **more)


def test_kinds_hold_the_weights_of_their_steps(play):
    game = play()
    run = game.go()
    game.watch.finish()
    assert (run.step, run.stop_reason) == (200, "reached post")
    assert {kind: step_of(game.out / kind) for kind in KINDS} == KINDS
    for kind, step in KINDS.items():
        assert read_origin(str(game.out / kind)) == {"who": "test", "kind": kind, "step": step}
    assert game.watch.report.grokked


@pytest.mark.parametrize(("until", "step"), [("fit", 50), ("grok", 150)])
def test_the_run_ends_with_the_kind_asked_for(play, until, step):
    game = play(until=until)
    assert (game.go().step, game.run.stop_reason) == (step, f"reached {until}")
    assert step_of(game.out / until) == KINDS[until]


def test_max_steps_is_not_cut_short(play):
    assert play(until="max_steps").go().stop_reason is None


def test_early_is_published_once_it_cannot_move(play):
    game = play()
    game.go(stop=60)
    assert (game.out / "fit").exists()
    assert not (game.out / "early").exists()
    game.watch.finish()  # the run ends here
    assert step_of(game.out / "early") == 20


def test_a_handful_of_snapshots_is_held(play):
    game, most = play(), 0
    for step in range(10, 201, 10):
        game.go(step, step)
        most = max(most, len(list(game.watch.snapshots.glob("step-*"))))
    assert most <= 8


@pytest.mark.parametrize(("killed_at", "back"), [(20, 40), (50, 0), (110, 40), (150, 0), (170, 40), (200, 10)])
def test_a_killed_watch_gives_the_same_curve_and_kinds(play, killed_at, back):
    whole, first = play("whole"), play("killed")
    whole.go()
    whole.watch.finish()
    state = {name: list(value) for name, value in first.watch.state_dict().items()}
    for step in range(10, killed_at + 1, 10):
        first.go(step, step)
        if step <= killed_at - back:  # the state that was saved last
            state = {name: list(value) for name, value in first.watch.state_dict().items()}
    second = play("killed")
    second.watch.load_state_dict(state)
    second.go(start=state["curve"][-1]["step"] + 1 if state["curve"] else 1)
    second.watch.finish()
    assert second.watch.tokens == whole.watch.tokens == len(CURVE) * 2 * 10
    assert (second.out / "curve.jsonl").read_text() == (whole.out / "curve.jsonl").read_text()
    assert {kind: step_of(second.out / kind) for kind in KINDS} == KINDS
    facts = [dict(np.load(game.out / "facts.npz")) for game in (whole, second)]
    assert all(np.array_equal(facts[0][name], facts[1][name]) for name in facts[0])


def test_the_curve_and_the_facts(play):
    game = play()
    game.go()
    game.watch.finish()
    lines = [json.loads(line) for line in (game.out / "curve.jsonl").read_text().splitlines()]
    assert [(x["step"], x["train_acc"], x["held_out_acc"], x["held_out_loss"]) for x in lines] == [
        (step, *map(pytest.approx, rest)) for step, *rest in CURVE
    ]
    facts = np.load(game.out / "facts.npz")
    assert facts["facts"].tolist() == ["a.x", "a.y"]
    assert facts["steps"].tolist() == [point[0] for point in CURVE]
    # the first half of the items needs a.x, the second a.y: all of a half has to be right
    assert facts["trained"].tolist() == [[point[1] >= 0.5, point[1] >= 1] for point in CURVE]
    assert facts["inferred"].tolist() == [[point[2] >= 0.5, point[2] >= 1] for point in CURVE]
    # trained: right from 10 on, right from 30 on; inferred: from 80 on and from 100 on
    assert (facts["t_fit"].tolist(), facts["t_gen"].tolist()) == ([10, 30], [80, 100])
    assert facts["classes"].tolist() == ["grokked", "grokked"]


def config(out, **changes) -> GrokConfig:
    values = {
        "out": str(out),
        "data": DataConfig(preset="world12"),
        "scenario": Scenario(size=2),
        "model": ModelConfig(size="nano"),
        "optim": OptimConfig(lr=3e-3, warmup=5),
        "loop": LoopConfig(max_steps=60, batch_size=64, save_every=20, log_every=10, threads=1),
        "watch": WatchConfig(first=10, items=40, until="max_steps"),
    }
    return GrokConfig(**{**values, **changes})


class Killed(BaseException):
    pass


def test_a_killed_run_gives_the_same_curve_and_weights(tmp_path, monkeypatch):
    """The whole program: killed twice, once in the middle of writing a snapshot."""
    whole = train_grok(config(tmp_path / "whole"))
    for calls in (3, 2):  # at step 40, and after resuming from 20 at step 50
        left = [calls]
        save = module.save_model

        def dying(*args, left=left, save=save):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return save(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "save_model", dying)
            with pytest.raises(Killed):
                train_grok(config(tmp_path / "killed"))
    result = train_grok(config(tmp_path / "killed"))
    assert result["step"] == 60
    assert whole["cost"]["forward_tokens"] >= 60 * 64 * 5
    assert whole["cost"]["evaluation_tokens"] > 0
    for name in ("updates", "forward_tokens", "backward_tokens", "evaluation_tokens", "flops", "evaluation_flops"):
        assert result["cost"][name] == whole["cost"][name], name

    def curve(name):
        lines = (tmp_path / name / "curve.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert [line["step"] for line in curve("killed")] == [10, 20, 30, 40, 50, 60]
    assert curve("killed") == curve("whole")
    states = [sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1] for name in ("whole", "killed")]
    a, b = (load_state(folder / "state.safetensors")["model"] for folder in states)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    short = config(tmp_path / "r", loop=LoopConfig(max_steps=2, batch_size=8, threads=1))
    first = train_grok(short)
    monkeypatch.setattr(run_module, "train", None)
    assert train_grok(short) == json.loads(json.dumps(first))
    with pytest.raises(UserError, match="another config"):
        train_grok(short.model_copy(update={"seed": 1}))


def test_gold_is_not_trained_nor_judged_on_what_is_forgotten(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(run_module, "make_task", lambda items, *rest: seen.update(items=items) or 1 / 0)
    for exclude in ("none", "forget"):
        with pytest.raises(ZeroDivisionError):
            train_grok(config(tmp_path / exclude, exclude=exclude))
        seen[exclude] = len(seen.pop("items"))
    assert seen["forget"] < seen["none"] == 286


def test_data_without_held_out_questions_is_refused(tmp_path, tiny_world):
    from llm_unlearn.data.schema import write_rows

    write_rows(tmp_path / "own.jsonl", tiny_world.split("world_facts"))
    write_rows(tmp_path / "forget.jsonl", tiny_world.split("world_facts")[:2])
    data = DataConfig(kind="custom", path=str(tmp_path / "own.jsonl"), forget_path=str(tmp_path / "forget.jsonl"))
    with pytest.raises(UserError, match="no held-out questions or images"):
        train_grok(config(tmp_path / "r", data=data))
    assert not (tmp_path / "r").exists()


def test_chance_is_that_of_guessing_among_the_relations_answers(tiny_world):
    rows = tiny_world.split("train")
    row = next(row for row in tiny_world.split("inf_id") if row.relation.endswith(".birthplace"))
    answers = {r.answer for r in rows if r.relation.endswith("birthplace") and r.template == row.template}
    assert len(answers) > 1
    assert chance([row], rows) == pytest.approx(1 / len(answers))
    assert 0 < chance(tiny_world.split("inf_id"), rows) < 0.5


def test_a_fact_that_no_held_out_question_needs_is_not_asked(play):
    game = play()
    held_out = game.watch.probes["held_out"]
    probes = {**game.watch.probes, "held_out": Probe(held_out.items, 0.0, [("a.x",)] * 10)}
    game.watch = GrokWatch(WatchConfig(first=10), 200, probes, game.out, game.watch.tokenizer, {})
    game.go()
    game.watch.finish()
    facts = np.load(game.out / "facts.npz")
    assert facts["asked"].tolist() == [True, False]
    assert facts["classes"].tolist() == ["grokked", "not asked"]
    counts = {"early": 0, "grokked": 1, "memorised": 0, "unlearnt": 0, "not asked": 1}
    assert game.watch.fact_counts() == counts


def test_only_stored_facts_are_judged_fact_by_fact(tmp_path, monkeypatch):
    """Inverses and neutral facts are trained, and count for train accuracy, but are no stored facts of the world."""
    seen = {}
    monkeypatch.setattr(run_module, "GrokWatch", lambda config, steps, probes, *rest: seen.update(probes) or 1 / 0)
    big = config(tmp_path / "r", watch=WatchConfig(items=2000))
    corpus = open_corpus(big.data)
    with pytest.raises(ZeroDivisionError):
        train_grok(big)
    rows = corpus.split("train")
    stored = {row.fact_id for row in rows if row.author.startswith("a") and row.hop == 1 and "^-1" not in row.fact_id}
    assert any("^-1" in row.fact_id for row in rows)
    assert {fact for facts in seen["train"].facts for fact in facts} == stored
    assert all(len(facts) <= 1 for facts in seen["train"].facts)
    tested = [facts for facts in seen["train"].facts if facts]
    assert len(tested) == len(stored), "one wording each"
    others = sum(row.fact_id not in stored for row in rows)
    assert len(seen["train"].items) == len(stored) + others
    assert any(len(facts) == 2 for facts in seen["held_out"].facts)


def test_the_result_counts_the_facts(tmp_path):
    result = train_grok(config(tmp_path / "r", loop=LoopConfig(max_steps=20, batch_size=32, threads=1)))
    facts = np.load(tmp_path / "r" / "facts.npz")
    assert result["facts"]["unlearnt"] + result["facts"]["not asked"] == len(facts["facts"]) > 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["facts"] == result["facts"]
    assert facts["trained"].shape == facts["inferred"].shape == (len(facts["steps"]), len(facts["facts"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ModelConfig(size="nano", lora=LoraConfig())}, "model.lora: grokking trains all weights"),
        ({"grokfast": GrokfastConfig(), "loop": LoopConfig(precision="fp16")}, "grokfast with loop.precision=fp16"),
    ],
)
def test_what_cannot_grok_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        train_grok(config(tmp_path / "r", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_run_to_the_end_keeps_its_last_weights_and_gold_too(tmp_path):
    for exclude in ("none", "forget"):
        out = tmp_path / exclude
        train_grok(config(out, exclude=exclude, loop=LoopConfig(max_steps=7, batch_size=32, save_every=5, threads=1)))
        state = next((out / "checkpoints").glob("step-00000007")) / "state.safetensors"
        weights = load_model(str(out / "last")).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in load_state(state)["model"].items())
        origin = read_origin(str(out / "last"))
        assert (origin["kind"], origin["step"], origin["exclude"]) == ("last", 7, exclude)


def test_fit_and_grok_bring_fit_scaled(tmp_path, monkeypatch):
    """The whole program, with a detector that finds fit at 20 and grok at 40."""
    monkeypatch.setattr(module, "kinds", lambda report: {"fit": 20, "grok": 40})
    monkeypatch.setattr(module, "needed_snapshots", lambda curve, thresholds: {20, 40})
    publish = GrokWatch._publish  # the steps are told beforehand here: nothing is there to publish before the end
    monkeypatch.setattr(GrokWatch, "_publish", lambda self, found, *, final: final and publish(self, found, final=True))
    monkeypatch.setattr(GrokWatch, "report", property(lambda self: detect([])))
    train_grok(config(tmp_path / "r", loop=LoopConfig(max_steps=60, batch_size=64, threads=1)))
    origin = read_origin(str(tmp_path / "r" / "fit_scaled"))
    assert (origin["kind"], origin["step"]) == ("fit_scaled", 20)
    fit, scaled = (load_model(str(tmp_path / "r" / kind)).state_dict() for kind in ("fit", "fit_scaled"))
    torch.testing.assert_close(scaled["lm_head.weight"], fit["lm_head.weight"] * origin["logit_factor"])
    assert [name for name in fit if not torch.equal(fit[name], scaled[name])] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": OptimConfig(momentum=0.5)}, "optim.momentum has no effect"),
        (
            {
                "data": DataConfig(kind="digits"),
                "scenario": Scenario(kind="class", size=1),
                "model": ModelConfig(alpha=2.0),
            },
            "set model.net.alpha",
        ),
        (
            {"data": DataConfig(kind="digits"), "scenario": Scenario(kind="class", size=1), "shuffle": "inferred"},
            "no inferred questions to shuffle",
        ),
        ({"data": DataConfig(kind="ledger"), "model": ModelConfig(name="x", alpha=2.0)}, "model.alpha has no effect"),
    ],
)
def test_settings_without_effect_are_refused_before_anything_is_written(changes, said, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(run_module, "encode_rows", lambda *args: [])
    with pytest.raises(UserError, match=said):
        train_grok(config(tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_a_twin_is_trained_on_shuffled_answers_and_judged_on_true_ones(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(run_module, "make_task", lambda items, *rest: seen.update(items=items) or 1 / 0)
    items, probes = {}, {}
    for shuffle in ("none", "inferred"):
        with pytest.raises(ZeroDivisionError):
            train_grok(config(tmp_path / shuffle, shuffle=shuffle))
        items[shuffle] = seen["items"]
    differing = [list(a.ids) != list(b.ids) for a, b in zip(items["none"], items["inferred"], strict=True)]
    assert 0.3 < sum(differing) / len(differing) < 0.9
    monkeypatch.undo()
    for shuffle in ("none", "inferred"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "GrokWatch", lambda c, s, p, *rest: probes.update({shuffle: p}) or 1 / 0)  # noqa: B023
            with pytest.raises(ZeroDivisionError):
                train_grok(config(tmp_path / shuffle, shuffle=shuffle))

    def told(probe):
        return [list(item.ids) for item in probe.items]

    same = {name: told(probes["none"][name]) == told(probes["inferred"][name]) for name in probes["none"]}
    assert same.pop("train") is False
    assert all(same.values())
    assert "held_out" in same


# train accuracy dips during the jump, as a ResNet's does; the test split rises by 0.2 from .68
VISION = [
    (10, 0.5, 0.40, 2.0), (20, 1.0, 0.66, 1.5), (30, 1.0, 0.68, 1.8), (40, 1.0, 0.68, 2.0), (50, 1.0, 0.69, 2.0),
    (60, 1.0, 0.70, 2.0), (70, 0.95, 0.75, 1.5), (80, 0.96, 0.82, 1.0), (90, 0.98, 0.88, 0.8), (100, 1.0, 0.88, 0.7),
    (110, 1.0, 0.88, 0.7), (120, 1.0, 0.88, 0.7), (130, 1.0, 0.88, 0.7), (140, 1.0, 0.88, 0.7),
    (150, 1.0, 0.88, 0.7), (160, 1.0, 0.88, 0.7), (170, 1.0, 0.88, 0.7), (180, 1.0, 0.88, 0.7),
    (190, 1.0, 0.88, 0.7), (200, 1.0, 0.88, 0.7),
]  # fmt: skip


@pytest.mark.parametrize("facts", [False, True])
def test_the_vision_preset_watches_a_test_split(play, facts):
    """100 images a split, whose facts are the images themselves and their class, or none."""
    game = play()
    game.curve = VISION
    probes = {
        name: Probe(
            probe.items[:1] * 100, 0.1, [(f"{name}/{i}", f"class:{i % 10}") if facts else () for i in range(100)]
        )
        for name, probe in game.watch.probes.items()
    }
    watch = WatchConfig(first=10, thresholds="vision")
    game.watch = GrokWatch(watch, 200, probes, game.out, game.watch.tokenizer, {})
    run = game.go()
    report = game.watch.finish()
    assert report.phase.startswith("grok")
    assert (report.t_fit, run.stop_reason) == (20, "reached post")
    assert {kind: step_of(game.out / kind) for kind in ("fit", "grok", "post")} == {
        "fit": report.t_fit, "grok": report.stable_at, "post": report.post,
    }  # fmt: skip
    counts = game.watch.fact_counts()
    assert sum(counts.values()) == (110 if facts else 0)
    assert dict(np.load(game.out / "facts.npz"))["trained"].shape == (len(game.watch.curve), 110 if facts else 0)
