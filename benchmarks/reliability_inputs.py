"""T18 of benchmarks/reliability.py: bad inputs given to programs. Each has to end in one line and exit code 2 with
every file as it was, or be accepted where the page says so.

Numbers are those of the page's list. Left out: 47 (accepted; takes a launcher, see the page), 51 (the launcher's own
message), 52 (no such setting), 54 (the folder is in the config).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability_trials import ROOT, TOY, Bench, struck

GOOD = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]
RUN = ["out=run", "model.size=nano", "loop.max_steps=2", "loop.batch_size=4", "loop.threads=1", "optim.warmup=0"]
QA = [*RUN, "data.kind=custom", "data.path=qa.jsonl", "data.forget_path=forget.jsonl"]
GROK = [*TOY, "loop.max_steps=2", "out=run", "watch.items=10"]
ON_WORLD = ["data.kind=world", "data.preset=world12", "scenario.size=2", *RUN, "model.name=m"]
UNLEARN = ["model=m", "out=run", "loop.max_steps=2", "loop.threads=1", "method.name=npo", "stop.items=10"]


@dataclass(frozen=True)
class Case:
    """An input: its number in the list, a program and its words, what the line has to say ("" where it is accepted),
    and what is made ready in the folder that the program runs in.
    """

    number: int
    program: str
    words: Sequence[str]
    said: str
    make: Callable[[Path, Path], Any] = lambda folder, start: None
    environment: tuple[str, str] | None = None


def rows(number: int, content: bytes, said: str) -> Case:
    """Return the case of a data file with this content."""
    return Case(
        number, "finetune", [*QA, "data.path=bad.jsonl"], said, lambda f, s: (f / "bad.jsonl").write_bytes(content)
    )


def row(**columns: Any) -> bytes:
    return b"".join(json.dumps(pair).encode() + b"\n" for pair in [*GOOD, columns])


def model(number: int, said: str, damage: Callable[[Path], Any]) -> Case:
    """Return the case of a fine-tuning from a damaged model."""

    def make(folder: Path, start: Path) -> None:
        shutil.copytree(start, folder / "m")
        damage(folder / "m")

    return Case(number, "finetune", ON_WORLD, said, make)


def edited(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Return a function that changes keys of a JSON file; None takes one away."""

    def edit(folder: Path) -> None:
        told = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in told.items() if value is not None}))

    return edit


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def poisoned(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def grown(tensors: dict[str, Any]) -> None:
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()


def other_tokenizer(folder: Path) -> None:
    from llm_unlearn.data.qa import world_corpus
    from llm_unlearn.data.source import make_tokenizer
    from llm_unlearn.data.world import preset

    make_tokenizer(world_corpus(preset("world40"), "world40")).save_pretrained(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def far_shards(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_of_nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    told = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/base"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def deaf(folder: Path, start: Path) -> None:
    """Leave a model whose tokenizer drops some characters, and data with an answer of nothing else."""
    shutil.copytree(start, folder / "m")
    told = json.loads((folder / "m/tokenizer.json").read_text())
    told["normalizer"] = {"type": "Replace", "pattern": {"Regex": " @+"}, "content": ""}
    (folder / "m/tokenizer.json").write_text(json.dumps(told))
    dump(folder / "bad.jsonl", [*GOOD, {"question": "Who is it?", "answer": "@@"}])


def endless(folder: Path, start: Path) -> None:
    with (folder / "bad.jsonl").open("wb") as file:
        file.truncate(5_000_000_000)  # sparse: takes no disk


def tofu(folder: Path, start: Path) -> None:
    full = [{"question": f"q {i} ?", "answer": f"a {i}"} for i in range(4000)]
    facts = [{"question": "f ?", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]}]
    wrong = [{**pair, "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]} for pair in full]
    files = {
        "full": full, "forget01": full[3960:], "retain99": full[:3960], "forget01_perturbed": wrong[3960:],
        "retain_perturbed": wrong[:400], "real_authors_perturbed": facts, "world_facts_perturbed": facts,
        "holdout01": full[:40],
    }  # fmt: skip
    for name, its in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in its))


def copied(folder: Path, start: Path) -> None:
    shutil.copytree(start, folder / "m")


def copied_run(folder: Path, start: Path) -> None:
    shutil.copytree(start.parent, folder / "run")


def mine(folder: Path, start: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/thesis.tex").write_text("precious")


def forked(work: Callable[[], None]) -> None:
    """Do something in another process, unheard."""
    pid = os.fork()
    if pid == 0:
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def staging(folder: Path, start: Path) -> None:
    """Leave a run that was killed in its third step, with half a state beside the whole ones."""

    def work() -> None:
        from llm_unlearn.train import loop

        os.chdir(folder)
        struck(loop, "_before_update", 3, lambda: os._exit(9))
        main_of("finetune")([*QA, "loop.max_steps=4", "loop.save_every=1"])

    forked(work)
    (folder / "run/checkpoints/.staging-step-00000003-9").mkdir()


def fitted(folder: Path, start: Path) -> None:
    """Leave a run on data without wrong answers, and a suite that asks for them."""

    def work() -> None:
        os.chdir(folder)
        main_of("finetune")(QA)

    forked(work)
    (folder / "ratio.yaml").write_text("name: ratio\nmetrics: {x: {metric: truth_ratio, split: forget}}\n")


SWAPPED = [*GOOD, {"question": "what is  1?", "answer": "It is 1."}]
LORA = "its base model is /nowhere/base, which is not there"
CASES = (
    rows(1, b'{"question": "a"', "bad.jsonl:1: invalid JSON"), rows(2, b"", "no records"),
    rows(3, row(question="a", answer="b") + b'{"question": "caf\xe9"}', "bad.jsonl:14: not UTF-8"),
    rows(4, b"\xef\xbb\xbf" + row(question="Is it?", answer="It is."), ""),
    rows(5, row(question="a"), "missing field 'answer'"), rows(6, row(question="a", answer=None), ":13: empty answer"),
    rows(6, row(question="a", answer=" "), ":13: empty answer"),
    rows(7, row(question="a", answer=["b"]), "must be text, got list"),
    rows(8, row(question="a", answer=7), "must be text, got int 7"), rows(9, row(**GOOD[3]), "duplicate"),
    Case(10, "finetune", QA, "forget set is empty", lambda f, s: (f / "forget.jsonl").write_text("")),
    Case(11, "finetune", [*QA, "data.forget_path=qa.jsonl"], "forget"),
    Case(12, "finetune", QA, "", lambda f, s: dump(f / "qa.jsonl", SWAPPED)),
    Case(13, "finetune", [*RUN, "data.kind=tofu", "data.path=.", "data.forget_split=forget01"],
         "items in both holdout and train", tofu),
    Case(14, "cli", ["eval", "run", "--suite", "ratio.yaml"], "no perturbed answers", fitted),
    Case(15, "finetune", [*QA, "data.max_length=8", "data.path=bad.jsonl"], "tokens > 8",
         lambda f, s: dump(f / "bad.jsonl", [*GOOD, {"question": "Is it?", "answer": "yes and yes " * 9}])),
    Case(16, "finetune", [*QA, "data.path=bad.jsonl", "model.name=m"], "no answer tokens in '@@'", deaf),
    rows(17, row(question="a\0", answer="b"), "invalid character U+0000"),
    rows(17, row(question="a", answer="\ud800"), "invalid character U+D800"),
    Case(18, "finetune", [*QA, "data.path=none.jsonl"], "none.jsonl: no such file"),
    Case(18, "finetune", [*QA, "data.path=."], "is a folder"),
    Case(19, "finetune", [*QA, "data.path=bad.jsonl"], "line exceeds 10 MB", endless),
    rows(20, gzip.compress(row(question="a", answer="b")), "looks like gzip"),
    Case(21, "finetune", [*ON_WORLD, "model.name=./nowhere"], "./nowhere"),
    Case(22, "finetune", [*ON_WORLD, "model.name=no-such/model"], "HF_HUB_OFFLINE=1"),
    model(23, "another vocabulary or shape", edited("config.json", vocab_size=99)),
    model(23, "do not fit the config", edited("config.json", hidden_size=64)),
    model(24, "tokenizer has", other_tokenizer), model(25, "", edited("tokenizer_config.json", pad_token=None)),
    model(26, "end token", edited("tokenizer_config.json", eos_token=None)),
    Case(27, "cli", ["eval", "m", "--suite", "quick", "--format", "chat"], "no chat template", copied),
    model(28, "m: ", lambda m: os.truncate(m / "model.safetensors", 1000)),
    model(29, "weights are missing", weights(lambda t: t.pop("model.norm.weight"))), model(30, "", weights(grown)),
    model(31, "hold NaN or inf", weights(poisoned)), model(32, "only pickle weights", pickled),
    model(33, "auto_map", edited("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}, model_type="evil")),
    model(34, "leaves the model's folder", far_shards), model(35, LORA, adapter_of_nothing),
    model(36, "are quantised", edited("config.json", quantization_config={"quant_method": "bitsandbytes"})),
    Case(37, "run_unlearn", [*UNLEARN, "method.name=nop"], "did you mean 'npo'", copied),
    Case(38, "train_grok", [*GROK, "optim.weigth_decay=1"], "did you mean optim.weight_decay"),
    Case(39, "train_grok", ["--config", "c.yaml"], "twice",
         lambda f, s: (f / "c.yaml").write_text("optim: {lr: 1, lr: 2}\n")),
    *(Case(40, "train_grok", [*GROK, f"optim.lr={lr}"], "optim.lr") for lr in ("nan", "-1e-3", "0")),
    Case(41, "train_grok", [*GROK, "loop.batch_size=0"], "loop.batch_size"),
    Case(41, "train_grok", [*GROK, "loop.max_steps=-1"], "loop.max_steps"),
    Case(41, "train_grok", [*GROK, "loop.save_every=9"], ""),
    Case(42, "train_grok", [*GROK, "data.preset=p97"], "unknown world preset"),
    *(Case(42, "train_grok", [*GROK, f"scenario.size={n}"], said)
      for n, said in ((0, "scenario.size"), (12, "forget at most half"), (13, "forget at most half"))),
    Case(43, "train_grok", [*GROK, "loop.precision=fp16"], "loop.precision=fp16"),
    Case(44, "train_grok", [*GROK, "seed=1.5"], "seed"),
    Case(45, "run_unlearn", [*UNLEARN, "gold=m"], "trained on the forget set", copied),
    Case(46, "finetune", [*ON_WORLD[:-1], "optim.lr=1e-3"], "run", copied_run),
    Case(48, "train_grok", [*GROK, "out=/sys/run"], "/sys/run"),
    Case(49, "train_grok", GROK, "another kind of run", copied_run), Case(49, "train_grok", GROK, "not empty", mine),
    Case(50, "finetune", [*QA, "loop.max_steps=4", "loop.save_every=1"], "is being written by process", staging),
    Case(53, "train_grok", GROK, "the launcher", environment=("WORLD_SIZE", "2")),
    Case(55, "finetune", [*QA, "loop.max_steps=4", "loop.save_every=1"], "", staging),
    Case(56, "cli", ["study", "status", "s.yaml"], "newer version"),
)  # fmt: skip


def dump(path: Path, pairs: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def main_of(program: str) -> Callable[[list[str]], None]:
    """Return a recipe's main function, or the command line, as a function of its words."""

    def run(words: list[str]) -> None:
        sys.argv = [program, *words]
        if program == "cli":
            from llm_unlearn.cli import app

            app(words, standalone_mode=False)
            return
        spec = importlib.util.spec_from_file_location(program, ROOT / f"recipes/{program}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()

    return run


def files(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, lock files and very large ones aside."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and p.stat().st_size < 1 << 30)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def bad_input(bench: Bench, k: int) -> dict[str, Any]:
    """T18: one input of the list, given to a program in a folder of its own."""
    from llm_unlearn.train.lock import locked

    case, folder = CASES[k], bench.folder / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bench.run(lambda: None)  # makes the start model
    dump(folder / "qa.jsonl", GOOD)
    dump(folder / "forget.jsonl", GOOD[:2])
    if case.number == 56:
        newer_study(folder)
    case.make(folder, bench.folder / "start/final")
    before = files(folder)

    def work() -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # the process that this one is forked from has one
        os.chdir(folder)
        os.environ.update([case.environment] if case.environment else [])
        main_of(case.program)(list(case.words))

    with locked(folder / "run") if case.number == 50 else nullcontext():
        code = bench.run(work, bench.folder / "said")
    lines = [line for line in (bench.folder / "said").read_text().splitlines() if line.strip()]
    if case.said:
        one_line = len(lines) == 1 and lines[0].startswith("error: ") and case.said in lines[0]
        passed = code == 2 and one_line and files(folder) == before
    else:
        passed = code == 0 and (folder / "run/run.json").exists() and not list(folder.rglob(".staging-*"))
    said = [line.replace(f"{folder}/", "")[:300] for line in lines[:3]]
    return {"passed": passed, "number": case.number, "code": code, "said": said}


def newer_study(folder: Path) -> None:
    """Leave a study one of whose results is of a version to come."""
    from llm_unlearn.config import load_config
    from llm_unlearn.study.config import StudyConfig
    from llm_unlearn.study.matrix import plan
    from llm_unlearn.study.store import SCHEMA_VERSION, Store

    text = f"out: {folder / 'study'}\nseeds: [0]\ncheckpoints: [early]\nmethods: {{npo: {{}}}}\n"
    (folder / "s.yaml").write_text(text + "grok: {data: {preset: world12}, scenario: {size: 2}}\n")
    cell = plan(load_config(StudyConfig, folder / "s.yaml", []))[0]
    Store(folder / "study").write(cell, "ok")
    edited(f"cells/{cell.id}.json", schema_version=SCHEMA_VERSION + 1)(folder / "study")
