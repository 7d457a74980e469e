"""The commands of the README, run as they stand on a toy world in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the README's world groks in minutes; the toy is done in seconds and never does, so `early` stands in for `grok`
TOY = (
    ("--out data/world40", "--out data/toy --preset world12"),
    ("configs/grok/world40.yaml", "configs/grok/toy.yaml"),
    ("configs/unlearn/npo_world40.yaml", "configs/unlearn/npo_world40.yaml loop.max_steps=10"),
    ("runs/world40", "runs/toy"),
    ("unlearn/grok/", "unlearn/early/"),
    ("@grok", "@early"),
)

# a grokking run takes half a minute: after 100 steps there is an `early`, which stands in for the others
TOY_IMAGES = (
    ("configs/grok/digits.yaml", "configs/grok/digits.yaml loop.max_steps=100"),
    ("unlearn/grok/", "unlearn/early/"),
    ("@grok", "@early"),
    ("@fit", "@early"),
)


def readme_commands(name: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- commands:{name}.*?-->\n```\n(.*?)```", text, re.DOTALL)
    assert block, f"README.md has no command block '{name}'"
    return [line.split("  #")[0] for line in block[1].splitlines() if line.strip()]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "LLM_UNLEARN_QUIET": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.integration
def test_the_main_job_by_hand(tmp_path):
    for name in ("recipes", "data_prep", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name)
    commands = readme_commands("main")
    assert len(commands) == 7
    for command in commands:
        for old, new in TOY:
            command = command.replace(old, new)
        last = run(command, tmp_path)
    assert "report.html" in last.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000
    results = list((tmp_path / "runs/toy/unlearn/early/npo").rglob("results.json"))
    assert len(results) == 1
    metrics = json.loads(results[0].read_text())["metrics"]
    assert metrics["forget_Q_A_Prob"]["value"] < metrics["forget_Q_A_Prob"]["start"], "NPO forgot nothing"
    assert metrics["forget_quality"]["gold"] == 1.0
    # run again: a finished run is not repeated, an evaluation is read back
    before = results[0].stat().st_mtime_ns
    records = results[0].with_name("records.parquet").stat().st_mtime_ns
    run(
        "llm-unlearn eval runs/toy/unlearn/early/npo --suite tofu_world --reference runs/toy-gold@early --json",
        tmp_path,
    )
    assert results[0].with_name("records.parquet").stat().st_mtime_ns == records
    assert results[0].stat().st_mtime_ns >= before


@pytest.mark.integration
def test_the_same_on_images(tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    commands = readme_commands("images")
    assert len(commands) == 6
    for command in commands:
        for old, new in TOY_IMAGES:
            command = command.replace(old, new)
        run(command, tmp_path)
    (results,) = (tmp_path / "runs/digits/unlearn/early").rglob("results.json")
    told = json.loads(results.read_text())
    assert told["metrics"]["forget_acc"]["value"] < told["metrics"]["forget_acc"]["start"], "NegGrad+ forgot nothing"
    assert told["metrics"]["forget_acc"]["gold"] < 0.5, "gold never saw the class"
    assert (told["data"], told["run"]["architecture"]) == ("image", "cnn")
    assert {a["split"] for a in told["answers"]["after"]} == {"forget", "retain"}
    page = (tmp_path / "digits.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 12
    assert "two hops" not in page
    assert "forgotten questions" not in page
    assert (tmp_path / "runs/digits/early").is_dir()
    assert list((tmp_path / "runs/digits").rglob("probes.json"))


@pytest.mark.integration
def test_quickstart_on_a_toy_world(tmp_path):
    done = run(f"llm-unlearn quickstart --preset world12 --out {tmp_path}/q --json", tmp_path)
    told = json.loads(done.stdout)
    assert told["cells"]["ok"] >= 11, "two trainings, and nine methods from at least one checkpoint"
    assert "failed" not in told["cells"]
    assert (tmp_path / "q/report.html").exists()
    again = json.loads(run(f"llm-unlearn quickstart --preset world12 --out {tmp_path}/q --json", tmp_path).stdout)
    assert again["comparison"] == told["comparison"]
