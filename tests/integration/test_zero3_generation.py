"""Greedy answers of a model whose weights ZeRO-3 has divided among two processes: those of one.

Both processes answer the same items, since DeepSpeed (0.19.8) compares its steps across processes in every forward
pass, also while weights are gathered: with other items on each they would wait for each other. Several processes divide
the items of an evaluation between whole copies of the model (test_eval_processes.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_unlearn.config import build_config
from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.data.world import preset
from llm_unlearn.eval.generation import generate
from llm_unlearn.models.pretrained import load_model, load_tokenizer
from llm_unlearn.train.finetune import FinetuneConfig, finetune

ROOT = Path(__file__).resolve().parents[2]
NEW = 12
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its extension for CPUs with g++"),
]
PROGRAM = """
import json, sys
from pathlib import Path

import torch

from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.data.world import preset
from llm_unlearn.eval.generation import generate
from llm_unlearn.models.pretrained import load_model, load_tokenizer
from llm_unlearn.train import engine
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator

folder = Path(sys.argv[1])
lm, tokenizer = load_model(str(folder / "run")), load_tokenizer(str(folder / "run"))
items = encode_rows(tokenizer, world_corpus(preset("world12"), "world12").split("train")[:24])
loop = LoopConfig(batch_size=2, threads=1)
accelerator = make_accelerator(loop, 1)
optimizer = torch.optim.AdamW(lm.parameters())
model, _ = engine.prepare(accelerator, lm, optimizer, OptimConfig(), loop)
lm = accelerator.unwrap_model(model)
held = sum(p.numel() for p in lm.parameters())
told = {"held": held, "texts": generate(lm, tokenizer, items, int(sys.argv[2]))}
(folder / f"{accelerator.process_index}.json").write_text(json.dumps(told))
torch.distributed.destroy_process_group()
"""


def test_texts_are_those_of_one_process(tmp_path):
    run = tmp_path / "run"
    values = {"data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2}, "model": {"size": "nano"}}
    loop = {"batch_size": 32, "max_steps": 120, "threads": 1}
    finetune(build_config(FinetuneConfig, {**values, "out": str(run), "loop": loop, "optim": {"lr": 1e-2}}))
    tokenizer = load_tokenizer(str(run))
    items = encode_rows(tokenizer, world_corpus(preset("world12"), "world12").split("train")[:24])
    wanted = generate(load_model(str(run)), tokenizer, items, NEW)
    assert len({len(tokenizer(text)["input_ids"]) for text in wanted}) > 1, "rows stop at different lengths"
    assert len(set(wanted)) > 4

    config = json.loads((ROOT / "recipes/launch/deepspeed/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so small a model would be kept whole
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--use_deepspeed"]
    command += ["--deepspeed_config_file", str(tmp_path / "zero3.json"), "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", str(tmp_path / "program.py"), str(tmp_path), str(NEW)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed builds an extension with ninja
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [t["held"] for t in told] == [0, 0], "outside a layer's forward pass no process holds its weights"
    assert [t["texts"] for t in told] == [wanted] * 2
