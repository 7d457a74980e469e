"""Runs that are killed, asked to end, starved of disk, corrupted or cut off: the table of docs/reliability.md.

    python benchmarks/reliability.py                            # every row, with as many trials as its bar asks for
    python benchmarks/reliability.py --rows T2,T4 --trials 20   # some rows, fewer trials
    python benchmarks/reliability.py --rows ""                  # write the page from what has been measured

Results are kept after every trial: run it again to go on. More trials than before are added to those there. Long: T15
and T16 take about an hour each on one core, everything else together about as much. Root is needed for T5 (tmpfs) and
T11 (network namespaces).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reliability_inputs as inputs
import reliability_numbers as numbers
import reliability_slurm as slurm
import reliability_stress as stress
import reliability_trials as trials
from reliability_trials import ROOT, Bench

from llm_unlearn.files import write_atomic
from llm_unlearn.study.store import environment


@dataclass(frozen=True)
class Row:
    """A row: the question, the bar, what stock tools did (measured or read in 2026, see the page), and how it is tried:
    `trial(bench, k)` for k = 0 ... n - 1, tests of the suite, or the checks of another program's results.
    """

    name: str
    what: str
    bar: str
    stock: str
    n: int = 1
    trial: Callable[..., dict[str, Any]] | None = None
    tests: tuple[str, ...] = ()
    results: str = ""
    note: str = ""


ROWS = (
    Row(
        "T1", "kill -9 in a random step, resumed, against the uninterrupted run: weights and every journal line",
        "100/100 bit-identical", "Trainer 14/14; random pairing 0/8; bare Accelerate loop 0/3", 100, trials.random_kill,
        note="train_grok with Grokfast, finetune with accumulation, ga, npo, idk_dpo, rmu, npo with LoRA; every fifth "
        "trial is killed three times",
    ),
    Row(
        "T2", "kill -9 inside a save: state file cut off, or before or after any call that changes the folder",
        "0/300 unresumable, at most one save interval lost", "Trainer: 6 of 10 unresumable", 300, trials.save_kill,
    ),
    Row(
        "T3", "random schedules of saves and rotations, killed in between, an older run's folder in the way",
        "a valid checkpoint at every instant, 0 wrong deletions, 1,000 schedules",
        "deleted the newest, or every one (threads 27138, 25136)", 1000, trials.schedule,
    ),
    Row(
        "T4", "SIGTERM or SIGUSR1 in start-up, step, evaluation, save, and once more while saving",
        "state of the last step, exit code 143 or 138, within step + save + 5 s: 50/50", "0/6 saved (spd thread 677)",
        50, trials.signalled, note="one process; one of two processes: tests/reliability/test_signals.py",
    ),
    Row(
        "T5", "disk full at a random point (tmpfs), then room again",
        "one line naming the path, non-zero exit, no partial folder, resumes: 20/20",
        "32 lines without the word disk; the half checkpoint is picked", 20, trials.disk_full,
    ),
    Row(
        "T6", "NaN or inf in an item, a gradient or the loss, or weights that overflow, in a random step of every job "
        "of T1", "stops within that step, names step and items, nothing on disk is not finite", "", 56,
        numbers.not_finite,
    ),
    Row(
        "T6b", "gradient accumulation 1x8 against 8x1, every loss of the table of methods: a test each",
        "relative difference of the whole gradient, and of the loss, at most 1e-6 (fp32)",
        "custom losses were scaled wrong (thread 37766)", tests=("tests/unit/train/test_loop.py -k accumulation",),
    ),
    Row(
        "T7", "scores and greedy texts in batches of any size, padded on either side, in any order, in parts, by 1, 2 "
        "or 3 processes, against one item alone in float64: a test each",
        "log-probabilities within 1e-5 (fp32), texts the same, every item once",
        "GPT-2 padded on the left without positions: .91 off", tests=(
            "tests/unit/eval/test_scoring.py -k 'changes_nothing or one_by_one or in_its_place or half_precision'",
            "tests/unit/eval/test_generation.py -k 'changes_nothing or equals or ragged'",
            "tests/unit/eval/test_shards.py",
            "tests/integration/test_eval_processes.py -k changes_nothing",
        ), note="broken off and gone on with: T9",
    ),
    Row(
        "T8", "rows 1..17 x processes 1..4 x batches 1..5", "340/340 equal to one process",
        "per-batch means wrong even with one process", 340, stress.gather_cases,
        note="the exchange is played in memory; over gloo: tests/integration/test_eval_processes.py",
    ),
    Row(
        "T9", "evaluation killed and resumed; another checkpoint in the same folder; weights edited in place",
        "resumed equals uninterrupted; scored again or refused, 0 stale numbers of 50",
        "caches keyed without the model (thread 4063)", 75, numbers.stale,
        note="edited: one weight by 10 % or more, size and times of the file as before",
    ),
    Row(
        "T10", "same seed in a fresh process with another hash seed, every job of T1; another seed",
        "same bits; another seed differs", "", 12, numbers.same_twice,
        note="one against two processes, within 1e-5: tests/integration/test_two_processes.py",
    ),
    Row(
        "T11", "two nodes (network namespaces): process killed, launcher killed, link cut, one process asked to end",
        "nothing alive and non-zero exit within timeout + 30 s, a rank named", "partition: a launcher hung for 635 s",
        4, stress.two_node_fault, note="gloo, static rendezvous, loop.timeout_s=20, launched through bounded.sh",
    ),
    Row(
        "T12", "greedy answers of a model divided by ZeRO-3 among two processes (gloo), rows that stop at different "
        "lengths",
        "ends, with the texts of one process", "hangs (threads 8262, 8321)",
        tests=("tests/integration/test_zero3_generation.py",),
        note="the same items on both; with answers of 3 and 12 tokens the processes wait for each other until "
        "loop.timeout_s: evaluations divide items between whole copies instead. FSDP not tried",
    ),
    Row(
        "T13", "16 processes write one store, 5 killed", "0 acknowledged lost, 0 torn, 0 doubled",
        "lock files race (threads 481, 382)", 3, stress.sixteen_writers,
        note="100 records each, not 1,000; local disk; file systems over a network were not tried",
    ),
    Row(
        "T14", "statistics: level under the null, coverage with clusters", "false positives 5 +-2 %, coverage 93-97 %",
        "naive test with clusters: 20-48 % false positives", results="benchmarks/results/stats_simulation.json",
        note="1,000 simulated studies each, with the clustering measured on a real one: "
        "[why.md](why.md#the-statistics-tested)",
    ),
    Row(
        "T15", "a long run of tiny steps with 200 states saved",
        "1e5 steps: memory +<5 %, open files constant, step time +<10 %", "", 1, stress.many_steps,
    ),
    Row(
        "T16", "500 cells, every tenth try crashes, the runner killed twice",
        "500 unique results, only missing ones run", "", 1, stress.five_hundred_cells,
        note="the cells' work is a stand-in",
    ),
    Row(
        "T16b", "the same through recipes/launch/slurm/study.sbatch: arrays of 16 tasks at once in any order, a crash "
        "in every tenth try, the whole cluster lost twice; stand-ins for sbatch, srun and scontrol",
        "500 unique results, only missing ones run", "", 1, slurm.array_of_cells,
        note="time limit, preemption and a lost node, with real cells: tests/reliability/test_slurm.py",
    ),
    Row(
        "T17", "any file of the newest state cut off or one bit flipped at a random place",
        "50/50 found before training, the previous state taken", "crash, or silently used", 50, trials.corrupted,
    ),
    Row(
        "T18", "bad inputs given to programs", "one line, exit code 2, nothing written",
        "90-150 lines; silent for seven of them", len(inputs.CASES), inputs.bad_input,
        note=f"{len({case.number for case in inputs.CASES})} of the 56 inputs listed below, some in several forms; "
        "six are accepted, as the list says",
    ),
    Row(
        "T19", "10 pickles in 8 places each, code of a model, 8 names that lead out of a folder, 6 names of runs, 9 "
        "texts and names in a report, 5 tokens planted in the environment: a test each",
        "0 executions, 0 reads or writes outside, 0 unescaped, 0 bytes of a token in what is written or said",
        "shards outside the folder are read", tests=(
            "tests/reliability/test_security.py",
            "tests/unit/models/test_pretrained.py -k 'pickles or never_run or shards_outside'",
            "tests/unit/models/test_vision.py -k pickles",
            "tests/reliability/test_bad_images.py -k pickles",
            "tests/unit/report/test_html.py -k only_ever_text",
        ),
    ),
)  # fmt: skip


def measure(row: Row, n: int, bench: Bench, path: Path, steps: int) -> None:
    """Add trials to a row until there are n, keeping each result at once."""
    found = _read(path)
    mine = found.setdefault(row.name, {"trials": []})
    if row.name == "T15":  # shorter ones are no trials of this
        mine["trials"] = [trial for trial in mine["trials"] if trial["steps"] >= steps]
    while len(mine["trials"]) < n:
        k, started = len(mine["trials"]), time.time()
        assert row.trial is not None
        result = row.trial(bench, k, steps) if row.name == "T15" else row.trial(bench, k)
        mine["trials"].append(result)
        mine |= {
            "passed": sum(t["passed"] for t in mine["trials"]), "of": len(mine["trials"]),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(mine.get("seconds", 0) + time.time() - started, 1), "environment": environment(),
            "command": f"benchmarks/reliability.py --rows {row.name} --trials {len(mine['trials'])}"
            + (f" --steps {steps}" if row.name == "T15" else ""),
        }  # fmt: skip
        _write(path, row.name, mine)
        if not result["passed"]:
            print(f"{row.name} trial {k} failed: {json.dumps(result)[:600]}", flush=True)


def measure_tests(row: Row, path: Path) -> None:
    """Run a row's tests and count those that passed."""
    passed, of, started = 0, 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        for number, words in enumerate(row.tests):
            report = Path(folder) / f"{number}.xml"
            command = f"{sys.executable} -m pytest -q -p no:cacheprovider --junitxml={report} {words}"
            subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
            skipped = int(suite.get("skipped", 0))
            of += int(suite.get("tests", 0)) - skipped
            passed += int(suite.get("tests", 0)) - skipped - int(suite.get("failures", 0)) - int(suite.get("errors", 0))
    mine = {
        "passed": passed, "of": of, "unit": "tests", "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - started, 1), "environment": environment(),
        "command": f"benchmarks/reliability.py --rows {row.name}",
    }  # fmt: skip
    _write(path, row.name, mine)


def cite(row: Row, path: Path) -> None:
    """Count the checks of another program's committed results that kept their bars."""
    told = json.loads((ROOT / row.results).read_text(encoding="utf-8"))
    checks = {k: check for group in told["checks"].values() for k, check in group.items() if isinstance(check, dict)}
    mine = {
        "passed": sum(check["kept"] for check in checks.values()), "of": len(checks), "unit": "checks",
        "missed": [name for name, check in checks.items() if not check["kept"]],
        "seconds": told["seconds"], "environment": told["environment"],
        "command": told["command"].removeprefix("python "),
    }  # fmt: skip
    _write(path, row.name, mine)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, name: str, row: dict[str, Any]) -> None:
    """Put one row into the file, as it is now: another process may be measuring another one."""
    write_atomic(path, (json.dumps({**_read(path), name: row}, indent=1) + "\n").encode())


def table(found: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| | test | bar | stock tools | here | command |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        mine = found.get(row.name)
        here, command = "not run", ""
        if mine:
            unit = f" {mine['unit']}" if "unit" in mine else ""
            date = f", {mine['date']}" if "date" in mine else ""
            here = f"**{mine['passed']}/{mine['of']}**{unit}{date}{_more(row.name, mine)}"
            command = f"`python {mine['command']}`"
        what = f"{row.what} ({row.note})" if row.note else row.what
        lines.append(f"| {row.name} | {what} | {row.bar} | {row.stock or '-'} | {here} | {command} |")
    machines = sorted(
        {f"{mine['environment']['machine']}, {mine['environment']['cores']} cores" for mine in found.values()}
    )
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines) or 'nothing yet'}, shared with other work."])


def _more(name: str, mine: dict[str, Any]) -> str:
    """What else of a row's trials belongs into the table."""
    tried = mine.get("trials", [])
    if name == "T1" and tried:
        middle = sum(0 < (t["from_step"] or 0) < 24 for t in tried)
        return f"; {sum(t['kills'] for t in tried)} kills; {middle} last went on in the middle, others from the start"
    if name == "T3" and tried:
        return f"; {sum(t['crashes'] > 0 for t in tried)} with a crash"
    if name == "T4":
        saved = [t["saved_after_s"] for t in tried if t["saved_after_s"] is not None]
        early = f", {len(tried) - len(saved)} in start-up, with nothing to save yet"
        return f"; {len(saved)} saved, after at most {max(saved)} s{early}" if saved else ""
    if name == "T6" and tried:
        return f"; {sum(t['code'] == 0 for t in tried)} of unlearning delivered the best step before (exit code 0)"
    if name == "T9" and tried:
        kills = sum(t["kind"] == "killed" for t in tried)
        return f"; {kills} killed, {len(tried) - kills} with other weights"
    if name == "T2":
        lost = max(t["steps_lost"] for t in tried)
        return f"; {sum(t['killed'] for t in tried)} died in the save; at most {lost} steps lost, of an interval of 7"
    if name == "T11":
        return "; " + ", ".join(f"{t['fault']} {max(t['ended_after_s'])} s" for t in tried if all(t["ended_after_s"]))
    if name == "T15" and tried and "rss_growth" in tried[-1]:
        last = tried[-1]
        return f"; {last['steps']:,} steps, memory {last['rss_growth']:+.1%}, step time {last['step_cpu_drift']:+.1%}"
    if mine.get("missed"):
        return f"; missed: {', '.join(mine['missed'])}"
    if name == "T16b" and tried:
        last = tried[-1]
        return f"; {last['tasks']} tasks in {last['submitted']} arrays, {last['crashed_tries']} tries crashed"
    if name == "T16" and tried:
        return f"; {tried[-1]['crashed_tries']} tries crashed, {tried[-1]['starts']} starts"
    return ""


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Replace the table between the page's two marks."""
    head, _, rest = path.read_text(encoding="utf-8").partition("<!-- table -->\n")
    tail = rest.partition("<!-- end of table -->")[2]
    path.write_text(f"{head}<!-- table -->\n{table(found)}\n<!-- end of table -->{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", default=",".join(names), help="rows by comma; empty: only write the page")
    parser.add_argument("--trials", type=int, help="trials of each row; default: what its bar asks for")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of T15")
    parser.add_argument("--runs", type=Path, default=Path("runs/reliability"), help="folder for toy runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reliability.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/reliability.md")
    args = parser.parse_args()
    asked = [name for name in args.rows.split(",") if name]
    if unknown := set(asked) - set(names):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    bench = None  # one for all rows, which then share uninterrupted runs
    args.runs.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if row.name not in asked:
            continue
        print(f"{time.strftime('%H:%M:%S')} {row.name}: {row.what}", flush=True)
        if row.results:
            cite(row, args.out)
        elif row.tests:
            measure_tests(row, args.out)
        else:
            bench = bench or Bench(Path(tempfile.mkdtemp(dir=args.runs)).absolute())
            measure(row, args.trials or row.n, bench, args.out, args.steps)
        done = _read(args.out)[row.name]
        print(f"{time.strftime('%H:%M:%S')} {row.name}: {done['passed']}/{done['of']}", flush=True)
    if bench is not None:
        shutil.rmtree(bench.folder, ignore_errors=True)
    write_page(args.page, _read(args.out))


if __name__ == "__main__":
    main()
