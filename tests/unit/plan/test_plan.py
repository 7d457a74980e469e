"""Plans of the shipped configs, the command, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_unlearn.cli import app
from llm_unlearn.config import build_config
from llm_unlearn.data.source import make_tokenizer, open_corpus
from llm_unlearn.data.splits import draw_request, training_rows
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.pretrained import ModelConfig, build_model, skeleton
from llm_unlearn.plan.memory import ENGINES
from llm_unlearn.plan.table import make_plan
from llm_unlearn.plan.workload import RECIPES, read_recipe, workload
from llm_unlearn.seeding import derive
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.unlearn.config import UnlearnConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "recipes" / "configs"
TOY = {
    "data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2}, "model": {"size": "nano"},
    "loop": {"batch_size": 8, "threads": 1, "max_steps": 30},
}  # fmt: skip
WORDS = [
    "data.preset=world12", "scenario.size=2", "model.size=nano", "loop.batch_size=8", "loop.threads=1",
    "loop.max_steps=30",
]  # fmt: skip

BORROWED = {name: TOY[name] for name in ("data", "scenario")}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("start") / "run"
    finetune(build_config(FinetuneConfig, {**TOY, "out": str(out), "loop": {**TOY["loop"], "max_steps": 1}}))
    return str(out)


def invoke(*argv: str):
    return CliRunner().invoke(app, ["plan", *argv])


def test_a_skeleton_is_the_model_without_its_weights(start, tiny_tokenizer):
    for config in (ModelConfig(size="nano"), ModelConfig(name=start), build_config(ModelConfig, {"lora": {"rank": 4}})):
        real, empty = build_model(config, tiny_tokenizer, 0), skeleton(config, tiny_tokenizer)
        assert all(p.is_meta for p in empty.parameters())
        sizes = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()] for m in (real, empty)]
        assert sizes[0] == sizes[1]


def test_the_batches_are_those_of_the_run():
    config = build_config(FinetuneConfig, {**TOY, "loop": {**TOY["loop"], "micro_batch": 2}})
    corpus = open_corpus(config.data)
    items = encode_rows(make_tokenizer(corpus), training_rows(corpus, draw_request(corpus, config.scenario), "none"))
    task = FitTask(items, 8, derive(0, "order"), Place(n_micro=4))
    batches = [batch for step in range(30) for batch, _ in task.micro_batches(step)]
    found = workload("finetune", config)
    sizes = {(b.n_rows, b.inputs.shape[1], b.n_tokens) for b in batches}
    largest = found.updates[0].largest[0].batch
    assert (largest.rows, largest.width, largest.answers) in sizes
    assert largest.tokens == max(b.inputs.numel() for b in batches)
    assert found.n_micro == 4
    assert found.steps == 30
    assert found.data_bytes >= 0


@pytest.mark.parametrize(
    ("method", "lora", "copies"),
    [
        ("npo", None, 0),
        ("kl", None, 1),
        ("kl", {}, 0),
        ("rmu", None, 1),
        ("bad_teacher", None, 2),
        ("bad_teacher", {}, 1),
    ],
)
def test_a_reference_is_counted_where_one_is_held(start, method, lora, copies):
    config = build_config(
        UnlearnConfig, {"model": start, "method": {"name": method}, "lora": lora, "loop": {"batch_size": 4}}
    )
    parts = make_plan("unlearn", config)["memory"]["one"]
    assert parts["reference"] == copies * parts["weights"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_planned_or_refused(start, name):
    config = build_config(UnlearnConfig, {"model": start, "method": {"name": name}, "loop": {"batch_size": 8}})
    if METHODS[name].kind == "edit":
        with pytest.raises(UserError, match="edits the weights once, which is not planned"):
            make_plan("unlearn", config)
        return
    plan = make_plan("unlearn", config, 2)
    method = METHODS[name]
    whole = method.gradient is not None or method.mask != "none"
    assert plan["memory"].keys() == ({"one", "ddp"} if whole else set(ENGINES))
    parts = plan["memory"]["one"]
    assert plan["operations"]["step"] > 0
    assert plan["tokens"]["step_padded"] >= plan["tokens"]["step"] > 0
    assert parts["step"] > parts["weights"] + parts["optimizer"]
    assert (parts["ready"] > 0) == (name in ("whp", "salun"))


@pytest.mark.parametrize(
    ("optim", "copies"), [({}, 2), ({"optimizer": "sgd"}, 1), ({"optimizer": "sgd", "momentum": 0.0}, 0)]
)
@pytest.mark.parametrize("recipe", ["grok", "unlearn"])
def test_the_optimizer_remembers_what_it_does(start, recipe, optim, copies):
    values = {**TOY, "optim": optim} if recipe == "grok" else {"model": start, "optim": optim}
    parts = make_plan(recipe, build_config(RECIPES[recipe], values))["memory"]["one"]
    assert parts["optimizer"] == copies * parts["weights"]


def test_sam_looks_twice_and_needs_whole_gradients():
    plain, sharp = (make_plan("grok", build_config(GrokConfig, {**TOY, "sam": sam}), 2) for sam in (None, {}))
    assert sharp["memory"].keys() == {"one", "ddp"}
    assert sharp["operations"]["step"] == 2 * plain["operations"]["step"]
    assert sharp["tokens"]["step_padded"] == 2 * plain["tokens"]["step_padded"]
    # at the shifted weights: gradient so far, the one at the weights, the shift, and the weights as they were
    parts = sharp["memory"]["one"]
    assert parts["gradients"] + parts["activations"] >= 4 * parts["weights"]


def test_alternates_that_are_not_written_yet_are_refused(start):
    method = {"name": "altpo", "alternates": "generated"}
    with pytest.raises(UserError, match="plan with method.alternates=perturbed or swapped"):
        make_plan("unlearn", build_config(UnlearnConfig, {"model": start, "method": method}))


@pytest.mark.parametrize("lora", [None, {}], ids=["whole", "lora"])
def test_checkpointing_trades_activations_for_operations(lora):
    def plan(checkpointing: bool):
        loop = {**TOY["loop"], "gradient_checkpointing": checkpointing}
        shape = {"hidden": 64, "layers": 6, "heads": 2, "ff": 128}
        return make_plan(
            "finetune", build_config(FinetuneConfig, {**TOY, "model": {"shape": shape, "lora": lora}, "loop": loop})
        )

    kept, again = plan(checkpointing=False), plan(checkpointing=True)
    assert again["memory"]["one"]["activations"] < 0.6 * kept["memory"]["one"]["activations"]
    assert again["operations"]["step"] > 1.2 * kept["operations"]["step"]


def test_an_adapters_folder_is_planned_as_its_base(start, tmp_path):
    out = str(tmp_path / "adapted")
    model = {"name": start, "lora": {"rank": 2}}
    finetune(build_config(FinetuneConfig, {**TOY, "out": out, "model": model, "loop": {**TOY["loop"], "max_steps": 2}}))
    whole, folder = (
        make_plan("unlearn", build_config(UnlearnConfig, {"model": name, **BORROWED}))
        for name in (start, f"{out}/adapter")
    )
    assert folder["parameters"] == whole["parameters"]


def test_processes_share_the_batch():
    config = build_config(FinetuneConfig, {**TOY, "loop": {**TOY["loop"], "batch_size": 64}})
    one, four = make_plan("finetune", config), make_plan("finetune", config, 4)
    assert four["batch"]["largest"][0]["rows"] == 16
    assert four["memory"]["ddp"]["activations"] < one["memory"]["ddp"]["activations"] / 3
    assert {k: v for k, v in four["memory"]["one"].items() if k not in ("data", "peak")} == {
        k: v for k, v in one["memory"]["one"].items() if k not in ("data", "peak")
    }
    assert four["tokens"]["step"] == one["tokens"]["step"]
    with pytest.raises(UserError, match="does not divide among 3 processes"):
        make_plan("finetune", config, 3)


def test_the_recipe_is_told_by_keys_folder_or_option(tmp_path):
    path = CONFIGS / "grok" / "ledger.yaml"
    assert read_recipe(path, [], None)[0] == "grok", "fine-tuning has all of its keys too: the folder decides"
    assert read_recipe(path, ["epochs=1"], "finetune")[0] == "finetune"
    assert read_recipe(None, ["method.name=ga"], None)[0] == "unlearn"
    copied = tmp_path / "x.yaml"
    copied.write_text(path.read_text())
    with pytest.raises(UserError, match="say --recipe grok"):
        read_recipe(copied, [], None)


def test_the_command_says_what_json_says():
    argv = ["--recipe", "finetune", "data.kind=world", *WORDS, "--processes", "2"]
    plan = json.loads(invoke(*argv, "--json").stdout)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *argv]).stdout
    assert f"{plan['parameters']:,} parameters" in shown
    assert "DDP" in shown
    assert "FSDP2" in shown
    assert "refused by the recipes" not in shown
    assert "s a step" not in shown, "no time without a probe"
    assert "probe" not in plan
    ddp = next(line for line in shown.splitlines() if line.split()[:1] == ["DDP"])
    assert f"{plan['memory']['ddp']['activations'] / 2**20:,.1f}" in ddp


def about(images: bool) -> list[Path]:
    shipped = sorted((CONFIGS / "grok").glob("*.yaml"))
    return [path for path in shipped if ("thresholds: vision" in path.read_text(encoding="utf-8")) is images]


@pytest.mark.parametrize("path", about(images=True), ids=lambda path: path.stem)
def test_plans_of_images_are_refused(path):
    done = invoke("--config", str(path), "data={kind: digits}")
    assert isinstance(done.exception, UserError)
    assert "'digits' holds images, and plans are made for language models only" in str(done.exception)


@pytest.mark.parametrize("path", about(images=False), ids=lambda path: path.stem)
def test_shipped_configs_can_be_planned(path):
    done = invoke("--config", str(path), "data={kind: world, preset: world12}", "scenario.size=2", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["recipe"] == "grok"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "which recipe is this for"),
        (["--recipe", "train"], "--recipe train: unknown; choose grok, finetune, unlearn"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--recipe", "grok", "model.sise=nano"], "unknown key 'model.sise'"),
        (["--recipe", "grok", "model.size=huge"], "unknown model size 'huge'"),
        (["--recipe", "grok", "--processes", "0"], "--processes 0: give at least 1"),
        (["--recipe", "grok", "--processes", "7"], "does not divide among 7 processes"),
        (["--recipe", "unlearn", "model=gone/run@grok"], "gone/run"),
        (["--recipe", "finetune", "data.path=gone"], "gone"),
    ],
)
def test_wrong_use_is_one_line(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*argv)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_probe_measures_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("--recipe", "grok", *WORDS, "--probe", "--probe-steps", "4", "--json")
    assert done.exit_code == 0, done.exception
    plan = json.loads(done.stdout)
    found = plan["probe"]
    assert found["steps"] == 4
    assert 0 < found["seconds_per_step"] < 10
    assert found["run_seconds"] == pytest.approx(found["seconds_per_step"] * 30)
    assert found["peak_bytes"] is None or 0 < found["peak_bytes"] < 200e6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_probe_of_a_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # no launcher has set it
    done = invoke("--recipe", "grok", *WORDS, "--probe")
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("--probe: the run does not get through its first steps: ")
    assert len(str(done.exception).splitlines()) == 1
