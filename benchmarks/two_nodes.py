"""Two nodes on one machine, each a network namespace, training together; then a process dies or the link does.

    python benchmarks/two_nodes.py --fault rank --timeout 20

Prints one JSON line: seconds until each node's launcher had ended, its exit code, what is left alive, whether the lost
rank was named, and the step of the state that is there. Needs root and `ip` (exits with 2 without).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("rank", "launcher", "link", "signal")
HEAD, NET = "10.213.77.1", "10.213.77"
MARGIN_S = 30


def possible() -> str:
    """Return why there can be no namespaces here, an empty text where there can."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return "network namespaces need root and ip"
    done = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespace: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"], check=True)
    return ""


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Yield the names of two namespaces joined by a link, whose ends are called `eth` in both."""
    names = [f"node{i}x{os.getpid()}" for i in (0, 1)]
    try:
        for name in names:
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"-n {names[0]} link add eth type veth peer name eth netns {names[1]}")
        for i, name in enumerate(names):
            _ip(f"-n {name} addr add {NET}.{i + 1}/24 dev eth")
            _ip(f"-n {name} link set eth up")
        yield names
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in found:
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(name: str, rank: int, out: Path, timeout_s: float, log: Path) -> subprocess.Popen:
    """Start a node's launcher, with one process of the training below it."""
    command = [
        "ip", "netns", "exec", name, str(ROOT / "recipes/launch/bounded.sh"), sys.executable, "-m",
        "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
        "--machine_rank", str(rank), "--main_process_ip", HEAD, "--main_process_port", "29511",
        str(ROOT / "recipes/train_grok.py"), "data.preset=world12", "scenario.size=2", "model.size=nano",
        "watch.items=20", "watch.first=1000", "watch.until=max_steps", "loop.batch_size=8", "loop.max_steps=1000000",
        "loop.save_every=100", "loop.log_every=1", "loop.threads=1", f"loop.timeout_s={timeout_s}", f"out={out}",
    ]  # fmt: skip
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth", "GRACE": "15",
        "HF_HUB_OFFLINE": "1", "LLM_UNLEARN_QUIET": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def pids(name: str, wanted: str) -> list[int]:
    """Return the processes of a namespace: its "worker" or its "launcher"."""
    found = []
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "python" not in Path(words[0]).name:
            continue
        if ("worker" if "accelerate.commands.accelerate_cli" not in words else "launcher") == wanted:
            found.append(int(pid))
    return found


def trial(fault: str, timeout_s: float, folder: Path) -> dict[str, Any]:
    """Train on two nodes, strike one of them, and wait for all to end."""
    out, logs = folder / "run", [folder / f"node{i}.log" for i in (0, 1)]
    with two_namespaces() as names:
        nodes = [start(name, i, out, timeout_s, logs[i]) for i, name in enumerate(names)]
        journal = out / "train_log.jsonl"
        while not journal.exists() or len(journal.read_text().splitlines()) < 20:
            if any(node.poll() is not None for node in nodes):
                raise RuntimeError("the training did not start:\n" + "\n".join(log.read_text() for log in logs)[-3000:])
            time.sleep(0.2)
        if fault == "link":
            _ip(f"-n {names[1]} link set eth down")
        else:
            victims = pids(names[1], "launcher" if fault == "launcher" else "worker")
            for pid in victims:
                os.kill(pid, signal.SIGTERM if fault == "signal" else signal.SIGKILL)
        struck, ended = time.monotonic(), [0.0, 0.0]
        while time.monotonic() - struck < timeout_s + 4 * MARGIN_S and not all(ended):
            for i, node in enumerate(nodes):
                if not ended[i] and node.poll() is not None:
                    ended[i] = time.monotonic() - struck
            time.sleep(0.1)
        time.sleep(1)
        alive = sum(len(pids(name, kind)) for name in names for kind in ("worker", "launcher"))
    said = "\n".join(log.read_text(errors="replace") for log in logs)
    return {
        "fault": fault,
        "timeout_s": timeout_s,
        "ended_after_s": [round(seconds, 1) if seconds else None for seconds in ended],
        "exit_codes": [node.poll() for node in nodes],
        "alive": alive,
        "rank_named": "rank      :" in said or "in rank " in said,
        "within_bar": all(ended) and max(ended) <= timeout_s + MARGIN_S and not alive and all(n.poll() for n in nodes),
        "saved_step": _saved(out),
        "last_lines": [log.read_text(errors="replace").strip().splitlines()[-1:] for log in logs],
    }


def _saved(out: Path) -> int | None:
    sys.path.insert(0, str(ROOT))
    from llm_unlearn.train.checkpoint import newest_valid, verify

    folder = newest_valid(out / "checkpoints")
    return None if folder is None else verify(folder)["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=FAULTS, default="rank")
    parser.add_argument("--timeout", type=float, default=20.0, help="loop.timeout_s of the training")
    parser.add_argument("--logs", type=Path, help="folder to keep the launchers' logs in")
    args = parser.parse_args()
    if reason := possible():
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        result = trial(args.fault, args.timeout, Path(folder))
        if args.logs:
            shutil.copytree(folder, args.logs, ignore=shutil.ignore_patterns("run"), dirs_exist_ok=True)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
