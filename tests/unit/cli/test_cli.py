"""The command line: help at once, lists as JSON, and one JSON object on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llm_unlearn.cli import app, main
from llm_unlearn.cli.common import run_command
from llm_unlearn.cli.doctor import NEEDED
from llm_unlearn.data.world import PRESETS
from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.table import METRICS
from llm_unlearn.eval.probes.table import PROBES
from llm_unlearn.eval.suite import suite_names
from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.image_nets import WIDTHS
from llm_unlearn.models.tiny import SIZES

ROOT = Path(__file__).resolve().parents[3]
LISTS = {
    "methods": METHODS, "gradients": GRADIENTS, "metrics": METRICS, "probes": PROBES, "suites": suite_names(),
    "worlds": PRESETS, "sizes": SIZES, "nets": WIDTHS,
}  # fmt: skip
HELP = """
import resource, sys
from llm_unlearn.cli import app, main
from llm_unlearn.cli.common import run_command
try:
    app(["--help"], prog_name="llm-unlearn")
except SystemExit as end:
    heavy = sorted({"torch", "transformers", "numpy", "pyarrow", "matplotlib", "datasets"} & set(sys.modules))
    print(end.code, resource.getrusage(resource.RUSAGE_SELF).ru_utime, *heavy, file=sys.stderr)
"""


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = sorted(commands(typer.main.get_command(app)))


def invoke(*argv: str):
    return CliRunner().invoke(app, list(argv))


def test_the_commands_are_those_promised():
    assert COMMANDS == sorted(
        [("quickstart",), ("eval",), ("probe",), ("compare",), ("report",), ("plan",), ("doctor",), ("tune",)]
        + [("study",), ("ls",)]
        + [("study", name) for name in ("plan", "run", "status", "reproduce", "report")]
        + [("ls", name) for name in LISTS]
    )


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_every_command_has_help(path):
    done = invoke(*path, "--help")
    assert done.exit_code == 0
    assert "Usage: " in done.stdout
    summary = [line for line in done.stdout.splitlines() if line.strip() and "Usage" not in line][0]
    assert len(summary.split()) > 3, "says in a sentence what it does"


def test_help_is_there_at_once():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HELP], env=env, capture_output=True, text=True, timeout=60)
    code, seconds, *heavy = done.stderr.split()
    assert code == "0"
    assert not heavy
    assert float(seconds) < 1
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_complete_as_json_and_as_tables(name):
    rows = json.loads(invoke("ls", name, "--json").stdout)
    assert [row["name"] for row in rows] == list(LISTS[name])
    shown = CliRunner(env={"COLUMNS": "600"}).invoke(app, ["ls", name]).stdout
    assert all(f" {row['name']} " in shown for row in rows)


def test_doctor_names_versions_and_the_exit_code_says_whether_anything_is_wrong():
    done = invoke("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == bool(found["problems"])
    assert all(found["versions"][name] for name in NEEDED)
    assert {"cuda devices", "cpu cores", "torch threads"} <= set(found["devices"])


def test_doctor_finds_what_is_wrong(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "problem: WORLD_SIZE=4 is set outside a launcher; unset it" in done.stdout


def test_a_plan_is_written_once_per_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("out: s\nseeds: [0, 1]\ncheckpoints: [grok]\nmethods: {npo: {}, ga: {}}\n")
    told = json.loads(invoke("study", "plan", "s.yaml", "--json").stdout)
    lines = [json.loads(line) for line in (tmp_path / told["path"]).read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(told["cells"])) == list(range(8))
    assert [line["kind"] for line in lines].index("unlearn") == told["trainings"] == 4
    assert invoke("study", "status", "s.yaml", "--ready").stdout == "0-3\n", "what unlearns waits for them"
    first = invoke("study", "plan", "s.yaml", "seeds=[0]").stdout.splitlines()
    assert first[0].split() == ["0", lines[0]["id"], "train", "seed0"]
    status = json.loads(invoke("study", "status", "s.yaml", "--json").stdout)
    assert status == {"ok": 0, "censored": 0, "failed": 0, "missing": 8, "errors": {}}
    refused = CliRunner().invoke(app, ["study", "run", "s.yaml", "--cell", "8"])
    assert "the study has cells 0 to 7" in str(refused.exception)


def test_numbers_of_cells_are_written_as_job_arrays_take_them():
    from llm_unlearn.cli.study import ranges

    assert [ranges(n) for n in ([], [3], [0, 1, 2], [0, 2, 3, 7, 8, 9, 11])] == ["", "3", "0-2", "0,2-3,7-9,11"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["evall"], "no such command 'evall'. Did you mean 'eval'?; see --help"),
        (["eval"], "give a model to evaluate, or --from-log TOFU_EVAL.json"),
        (["report"], "missing argument 'paths'; see --help"),
        (["compare", "x", "--by"], "option '--by' requires an argument; see --help"),
        (["eval", "x", "--bogus"], "no such option: --bogus"),
        (["study", "run", "x.yaml", "--jobs", "a"], "invalid value for '--jobs': "),
        (["eval", "runs/nope"], "runs/nope: no such folder here, and a model of the hub does not say what data"),
        (["compare", "runs/nope"], "runs/nope: no such folder or results.json"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(argv, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llm-unlearn", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {said}")
    assert shown.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["ls", "--help"], 0), ([], 2), (["study"], 2)])
def test_help_is_an_answer_and_no_error(argv, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llm-unlearn", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    shown = capsys.readouterr()
    assert "Usage: " in shown.out
    assert shown.err == ""


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["some-command"])
    with pytest.raises(SystemExit) as end:
        run_command(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_a_method_shows_its_card():
    text = invoke("ls", "methods", "--show", "npo").stdout
    assert "arXiv:2404.05868" in text
    assert "`beta` = 0.1 in (0, inf)" in text
    told = json.loads(invoke("ls", "methods", "--show", "npo", "--json").stdout)
    assert told["knobs"]["beta"]["search"] == [0.05, 0.1, 0.5]


def test_a_wrapper_shows_its_card_too():
    assert "arXiv:2502.05374" in invoke("ls", "methods", "--show", "sam").stdout
    told = json.loads(invoke("ls", "methods", "--show", "sam", "--json").stdout)
    assert (told["kind"], told["knobs"]["rho"]["default"]) == ("gradient", 0.01)


def test_an_unknown_method_has_no_card():
    with pytest.raises(UserError, match=r"unknown method 'nop' in --show; did you mean 'npo'\?"):
        CliRunner().invoke(app, ["ls", "methods", "--show", "nop"], catch_exceptions=False)
