"""Files from elsewhere run no code, names lead out of no folder, and tokens of the environment are in nothing that is
written. What a report shows of texts: tests/unit/report/test_html.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.cli import app
from llm_unlearn.config import build_config
from llm_unlearn.data.image_sets import ImageConfig, image_corpus
from llm_unlearn.data.loss_record import FILE, read_record
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.errors import UserError
from llm_unlearn.models.pretrained import load_model
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.train.checkpoint import MANIFEST, commit, verify
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.train.snapshot import save_model
from llm_unlearn.train.statefile import load_state
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.run import run_unlearn

pytestmark = pytest.mark.reliability


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def saved(what: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer, **options)
    return buffer.getvalue()


def array(what: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([what, None], object), labels=np.zeros(2), classes=np.array(["a"]))
    return buffer.getvalue()


PICKLES: dict[str, Callable[[str], bytes]] = {
    "a command": lambda ran: pickle.dumps(Evil(os.system, f"mkdir {ran}")),
    "as text": lambda ran: pickle.dumps(Evil(os.mkdir, ran), protocol=0),
    "a function": lambda ran: pickle.dumps(Evil(os.mkdir, ran)),
    "a program": lambda ran: pickle.dumps(Evil(subprocess.call, ["mkdir", ran])),
    "exec": lambda ran: pickle.dumps(Evil(exec, f"import os; os.mkdir({ran!r})")),
    "eval": lambda ran: pickle.dumps(Evil(eval, f"__import__('os').mkdir({ran!r})")),
    "deep inside": lambda ran: pickle.dumps({"state_dict": {"w": [1, (Evil(os.mkdir, ran),)]}}),
    "torch's archive": lambda ran: saved({"w": Evil(os.mkdir, ran)}),
    "torch's old file": lambda ran: saved({"w": Evil(os.mkdir, ran)}, _use_new_zipfile_serialization=False),
    "numpy's objects": lambda ran: array(Evil(os.mkdir, ran)),
}


@pytest.mark.parametrize("name", PICKLES)
def test_they_would_run_where_pickles_are_read(name, tmp_path):
    ran, content = tmp_path / "ran", PICKLES[name](str(tmp_path / "ran"))
    if name.startswith("torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    elif name.startswith("numpy"):
        np.load(io.BytesIO(content), allow_pickle=True)["images"]
    else:
        pickle.loads(content)
    assert ran.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_run_nothing_wherever_they_lie(name, tmp_path, tiny_lm, tiny_tokenizer):
    ran, m = tmp_path / "ran", save_model(tmp_path / "run/m", tiny_lm, tiny_tokenizer, {})
    content = PICKLES[name](str(ran))

    def place(file: str) -> str:
        folder = tmp_path / file.replace(".", "-")
        shutil.copytree(m, folder)
        if file != "training_args.bin":
            (folder / "model.safetensors").unlink()
        if file.startswith("adapter"):
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name": str(m)}))
            (folder / "config.json").unlink()
        (folder / file).write_bytes(content)
        return str(folder)

    for file in ("pytorch_model.bin", "model.safetensors", "adapter_model.bin"):
        with pytest.raises(UserError):
            load_model(place(file))
    load_model(place("training_args.bin"))  # beside weights that are fine: nobody looks at it
    for file in ("state.safetensors", "x.npz", "x.jsonl", FILE):
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError):
        load_state(tmp_path / "state.safetensors")
    with pytest.raises(UserError):
        read_record(tmp_path)
    with pytest.raises(UserError):
        image_corpus("npz", ImageConfig(train=1, test=1), str(tmp_path / "x.npz"), 0)
    with pytest.raises(UserError):
        open_corpus(build_config(DataConfig, {"kind": "custom", "path": str(tmp_path / "x.jsonl")}))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link", ".."])
def test_a_manifest_names_files_of_its_own_folder(name, tmp_path):
    (tmp_path / "x").write_text("w")
    folder = commit(tmp_path / "step-00000001", lambda f: (f / "x").write_text("w"), {"step": 1})
    (folder / "link").symlink_to(tmp_path / "x")
    told = (folder / MANIFEST).read_text()
    assert told.count('"x"') == 1
    (folder / MANIFEST).write_text(told.replace('"x"', json.dumps(name)))
    with pytest.raises(UserError):
        verify(folder)


@pytest.mark.parametrize("name", ["../npo", "..", ".", "/tmp/npo", "a/b", ".hidden"])
def test_names_in_a_study_are_folders_inside_it(name):
    for section in ("methods", "scenarios"):
        values: dict[str, Any] = {"methods": {"npo": {}}, "checkpoints": ["fit"]}
        values[section] = {name: {"method": {"name": "npo"}} if section == "methods" else {"size": 2}}
        with pytest.raises(UserError, match=f"bad name '{name}' in {section}"):
            plan(build_config(StudyConfig, values))


TOKENS = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0123456789", "HUGGING_FACE_HUB_TOKEN": "hf_PlantedToo0123456789abcdef",
    "WANDB_API_KEY": "5ec2e7" * 6, "OPENAI_API_KEY": "sk-planted-0123456789", "AWS_SECRET_ACCESS_KEY": "pLaNtEd+/" * 4,
}  # fmt: skip


def test_tokens_of_the_environment_are_in_nothing_that_is_written(tmp_path, monkeypatch, capfd):
    """A training, an unlearning, an evaluation, a study's record, a report, and all they say."""
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    monkeypatch.chdir(tmp_path)
    toy = {"data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2}, "model": {"size": "nano"}}
    loop = {"max_steps": 2, "batch_size": 4, "threads": 1}
    for out, exclude in (("a", "none"), ("gold", "forget")):
        finetune(build_config(FinetuneConfig, {**toy, "out": out, "exclude": exclude, "loop": loop}))
    start = {"model": "a", "gold": "gold", "out": "u", "loop": loop, "stop": {"items": 4}}
    run_unlearn(build_config(UnlearnConfig, start))
    app(["eval", "u", "--suite", "quick", "--reference", "gold"], standalone_mode=False)
    Path("s.yaml").write_text(
        "{out: s, seeds: [0], checkpoints: [early], methods: {npo: {}}, grok: {data: {preset: world12}, "
        "scenario: {size: 2}, model: {size: nano}, watch: {items: 10}, loop: {max_steps: 2, threads: 1}}}"
    )
    app(["study", "run", "s.yaml", "--cell", "0"], standalone_mode=False)
    app(["doctor"], standalone_mode=False)
    app(["report", "s", "--out", "report.html"], standalone_mode=False)
    said = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"results.json", "run.json", "train_log.jsonl", "report.html"} <= {path.name for path in files}
    for content in (said.out.encode(), said.err.encode(), *(path.read_bytes() for path in files)):
        assert not [name for name, token in TOKENS.items() if token.encode() in content]
