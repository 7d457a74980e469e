"""Wrong use of programs: one line saying what, where and how to fix it, exit code 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from llm_unlearn.data.schema import Corpus, QARow, save_corpus
from llm_unlearn.data.splits import Scenario, draw_request
from llm_unlearn.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    "data.preset=world12",
    "scenario.size=2",
    "model.size=nano",
    "loop.batch_size=32",
    "loop.threads=1",
    "watch.items=40",
]


def program(path: str):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def cli():
    from llm_unlearn.cli import app

    return app


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy run, its gold, gold of another forget set, and an unlearned model."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for out, extra in (("a", []), ("gold", ["exclude=forget"]), ("gold3", ["exclude=forget", "scenario.size=3"])):
            patch.setattr(
                sys, "argv", ["x", *TOY, f"out={out}", "loop.max_steps=100", "optim.lr=3e-3", "watch.first=50", *extra]
            )
            program("recipes/train_grok")()
            run = folder / out
            if not (run / "early").exists():
                newest = sorted((run / "snapshots").glob("step-*"))[-1]
                _as_kind(newest, run)
    _adapters(folder)
    shutil.copytree(folder / "a/early", folder / "quantised")
    told = json.loads((folder / "quantised/config.json").read_text())
    told["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "quantised/config.json").write_text(json.dumps(told))
    return folder


def _as_kind(snapshot: Path, run: Path) -> None:
    """The toy is too short to have kinds: publish its last weights as `early`."""
    from llm_unlearn.train.snapshot import copy_model

    origin = json.loads((run / "run.json").read_text())["origin"]
    copy_model(snapshot, run / "early", {**origin, "kind": "early", "step": 100})


def refused(main, argv: list[str], folder: Path, monkeypatch, capsys) -> str:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    before = files(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert files(folder) == before, "something was written"
    return lines[0]


GROK = [
    (["optim.weigth_decay=1"], "did you mean optim.weight_decay"),
    (["optim.lr=nan"], "optim.lr"),
    (["optim.lr=-1e-3"], "optim.lr"),
    (["optim.lr=0"], "optim.lr"),
    (["loop.batch_size=0"], "loop.batch_size"),
    (["data.preset=world41"], "did you mean 'world40'"),
    (["scenario.kind=author", "scenario.size=30"], "world too small"),
    (["scenario={kind: relation, relation: mentr}"], "did you mean 'mentor'"),
    (["model.size=huge"], "unknown model size 'huge'"),
    (["model.shape={hidden: 30, heads: 4}"], "no multiple"),
    (["model.name=no-such-org/no-such-model"], "HF_HUB_OFFLINE=1"),
    (["loop.batch_size=10", "loop.micro_batch=3"], "does not divide"),
    (["data.path=nowhere"], "nowhere"),
    (["seed=1.5"], "seed"),
]


@pytest.mark.reliability
@pytest.mark.parametrize(("extra", "said"), GROK, ids=[" ".join(e) for e, _ in GROK])
def test_train_grok_refuses(extra, said, tmp_path, monkeypatch, capsys):
    assert said in refused(program("recipes/train_grok"), [*TOY, "out=run", *extra], tmp_path, monkeypatch, capsys)


@pytest.mark.reliability
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_a_precision_that_the_machine_lacks_is_refused(tmp_path, monkeypatch, capsys):
    AcceleratorState._reset_state()
    try:
        argv = [*TOY, "out=run", "loop.precision=fp16"]
        said = refused(program("recipes/train_grok"), argv, tmp_path, monkeypatch, capsys)
    finally:
        AcceleratorState._reset_state()
    assert "loop.precision=fp16: needs a GPU" in said


UNLEARN = [
    (["method.name=nop"], "did you mean 'npo'"),
    (["method.params={betta: 1.0}"], "betta"),
    (["method.params={beta: -1.0}"], "beta"),
    (["method={name: rmu, layer: 7}"], "method.layer=7"),
    (["model=a@grok"], "a@early"),
    (["model=b@grok"], "no such run"),
    (["gold=gold3@early"], "another forget set"),
    (["gold=a@early"], "trained on the forget set"),
    (["stop.until=forgotten"], "stop.until"),
    (["stop.floor=70"], "stop.floor"),
    (["stop.over_forget=-1"], "stop.over_forget"),
    (["scenario={kind: author, size: 11}"], "world too small"),
    (["data={preset: world12, seed: 5}"], "other data"),
    (["model=adapter-of-nothing"], "its base model is /nowhere/base, which is not there"),
    (["model=adapter-of-another"], "is an adapter for another base than"),
    (["lora={targets: [qproj]}"], "lora.targets=('qproj',)"),
    (
        ["model=quantised", "data={preset: world12}"],
        "quantised (bitsandbytes), which cannot be trained",
    ),
]


def _adapters(trained: Path) -> None:
    """Two adapters: one whose base is gone, one made for a model of another width."""
    from peft import LoraConfig, get_peft_model

    from llm_unlearn.models.tiny import TinyConfig, build_tiny

    config = json.loads((trained / "a/early/config.json").read_text())
    for name, base in (("nothing", "/nowhere/base"), ("another", str(trained / "a/early"))):
        lm = build_tiny(TinyConfig(hidden=48), config["vocab_size"], config["eos_token_id"], config["pad_token_id"])
        folder = trained / f"adapter-of-{name}"
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(lm, lora).save_pretrained(folder)
        told = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": base}))


@pytest.mark.reliability
@pytest.mark.parametrize(("extra", "said"), UNLEARN, ids=[" ".join(e) for e, _ in UNLEARN])
def test_run_unlearn_refuses(extra, said, trained, monkeypatch, capsys):
    argv = ["model=a@early", "out=new", "loop.max_steps=2", "loop.threads=1", *extra]
    if extra[0].startswith("model=adapter"):
        argv.append("data={preset: world12}")
    assert said in refused(program("recipes/run_unlearn"), argv, trained, monkeypatch, capsys)


@pytest.mark.reliability
def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("precious")
    for out in ("/sys/run", "file/run"):  # nobody writes to /sys, not even root
        said = refused(program("recipes/train_grok"), [*TOY, f"out={out}"], tmp_path, monkeypatch, capsys)
        assert out in said


@pytest.mark.reliability
def test_folders_of_other_runs_are_refused(trained, monkeypatch, capsys):
    grok, unlearn = program("recipes/train_grok"), program("recipes/run_unlearn")
    changed = [*TOY, "out=a", "loop.max_steps=100", "optim.lr=1e-3", "watch.first=50"]
    assert "optim.lr 0.003 -> 0.001" in refused(grok, changed, trained, monkeypatch, capsys)
    assert "another kind of run" in refused(unlearn, ["model=a@early", "out=gold"], trained, monkeypatch, capsys)
    (trained / "mine").mkdir(exist_ok=True)
    (trained / "mine/thesis.tex").write_text("precious")
    assert "not empty" in refused(grok, [*TOY, "out=mine"], trained, monkeypatch, capsys)
    assert (trained / "mine/thesis.tex").read_text() == "precious"


EVAL = [
    (["a@early", "--suite", "tofu_wrld"], "did you mean 'tofu_world'"),
    (["a@early", "--suite", "bad.yaml"], "did you mean 'probability'"),
    (["a@early", "--suite", "tofu_world", "--reference", "gold3@early"], "another forget set"),
    (["a@early", "--suite", "tofu_world", "--reference", "a@early"], "trained on the forget set"),
    (["a@late"], "no checkpoint 'late'"),
    (["some/hub-model"], "does not say what data"),
]


@pytest.mark.reliability
@pytest.mark.parametrize(("argv", "said"), EVAL, ids=[" ".join(a) for a, _ in EVAL])
def test_eval_refuses(argv, said, trained, monkeypatch, capsys):
    (trained / "bad.yaml").write_text("name: bad\nmetrics: {x: {metric: probabilty, split: forget}}\n")
    assert said in refused(lambda: cli()(["eval", *argv], standalone_mode=False), [], trained, monkeypatch, capsys)


@pytest.mark.reliability
def test_study_and_compare_refuse(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text("methods: {nop: {}}\n")
    run = lambda *argv: refused(lambda: cli()(list(argv), standalone_mode=False), [], tmp_path, monkeypatch, capsys)  # noqa: E731
    assert "did you mean 'npo'" in run("study", "plan", "s.yaml")
    assert "did you mean 'grok'" in run("study", "plan", "s.yaml", "methods={npo: {}}", "checkpoints=[grokk]")
    assert "repeat" in run("study", "plan", "s.yaml", "methods={npo: {}}", "seeds=[1, 1]")
    assert "optim.lrr" in run("study", "plan", "s.yaml", "methods={npo: {optim: {lrr: 1}}}")
    assert "did you mean 'world40'" in run("study", "plan", "s.yaml", "methods={npo: {}}", "grok.data.preset=world41")
    assert "unknown model size 'huge'" in run("study", "run", "s.yaml", "methods={npo: {}}", "grok.model.size=huge")
    assert "bad name '../npo'" in run("study", "run", "s.yaml", "methods={../npo: {method: {name: npo}}}")
    assert "did you mean 'world40'" in run("quickstart", "--preset", "world41", "--out", "q")
    assert "no evaluated unlearning run" in run("compare", ".")


@pytest.mark.reliability
def test_a_world_changed_by_hand_is_refused(tmp_path, tiny_world, monkeypatch, capsys):
    save_corpus(tiny_world, tmp_path / "w")
    path = tmp_path / "w/train.jsonl"
    path.write_text(path.read_text().replace("mentor", "mentos", 1))
    argv = [*TOY, "data.path=w", "out=run"]
    assert "train.jsonl" in refused(program("recipes/train_grok"), argv, tmp_path, monkeypatch, capsys)


@pytest.mark.reliability
def test_custom_data_is_checked(tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]
    write = lambda name, part: (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in part))  # noqa: E731
    write("qa.jsonl", rows)
    write("forget.jsonl", rows[:2])
    base = ["data.kind=custom", "data.path=qa.jsonl", "data.forget_path=forget.jsonl", "out=run", "model.size=nano"]
    run = lambda *extra: refused(program("recipes/finetune"), [*base, *extra], tmp_path, monkeypatch, capsys)  # noqa: E731
    write("none.jsonl", [])
    assert "none.jsonl" in run("data.forget_path=none.jsonl")
    write("stranger.jsonl", [{"question": "What is love?"}])
    assert "stranger.jsonl" in run("data.forget_path=stranger.jsonl")
    assert "forget" in run("data.forget_path=qa.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", \n')
    assert "broken.jsonl:2" in run("data.path=broken.jsonl")
    write("column.jsonl", [{"question": "a", "reply": "b"}])
    assert "'answer'" in run("data.path=column.jsonl")


@pytest.mark.reliability
def test_a_model_of_another_vocabulary_is_refused(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "a/early", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 5}))
    argv = [*TOY, "model.name=m", "out=run"]
    assert "another vocabulary or shape" in refused(program("recipes/train_grok"), argv, tmp_path, monkeypatch, capsys)


@pytest.mark.reliability
def test_a_forget_row_that_is_also_kept_is_refused():
    rows = [QARow(f"What is {i}?", f"It is {i}.", fact_id=f"f{i}") for i in range(4)]
    twice = Corpus(
        "mine", "custom", {"train": (*rows, QARow("what is  1?", "It is 1.", fact_id="f9"))}, {"forget_rows": [1]}
    )
    with pytest.raises(UserError, match="both forget and retain"):
        draw_request(twice, Scenario())
