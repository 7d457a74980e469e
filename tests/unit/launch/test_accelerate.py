"""Every launch config is read by Accelerate itself, and what it would start is looked at in place of being started."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed.run as torchrun
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError
from llm_unlearn.plan.memory import BUCKET
from llm_unlearn.train.config import LoopConfig
from llm_unlearn.train.engine import check_engine, divided

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "recipes" / "launch"
OTHERS = {"trainjob.yaml", "sky.yaml"}
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name not in OTHERS)
JSONS = sorted((FOLDER / "deepspeed").glob("*.json"))
SCRIPT = ["recipes/finetune.py", "--config", "x.yaml", "out=runs/x"]
SHARDED = {"fsdp2.yaml", "nodes_zero2.yaml"} | {f"{path.stem}.yaml" for path in JSONS}


@pytest.fixture
def dry(monkeypatch):
    """A function from a config's name and options to what `accelerate launch` would start: the arguments of torchrun,
    or a command, and the environment.
    """
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    started: list[SimpleNamespace] = []

    class Process:
        returncode = 0

        def __init__(self, cmd: list[str], env: dict[str, str]) -> None:
            started.append(SimpleNamespace(by="process", cmd=cmd, env=env))

        def wait(self) -> None: ...

    def run(args: Any) -> None:
        started.append(SimpleNamespace(by="torchrun", args=args, env=dict(os.environ)))

    monkeypatch.setattr(torchrun, "run", run)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=Process, CalledProcessError=RuntimeError))
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)

    def start(name: str, *options: str) -> SimpleNamespace:
        words = ["--config_file", str(FOLDER / name), *options, *SCRIPT]
        launch.launch_command(launch.launch_command_parser().parse_args(words))
        assert len(started) == 1
        return started.pop()

    return start


def test_the_list_is_whole():
    assert {"cpu.yaml", "gpu.yaml", "ddp.yaml", "nodes_c10d.yaml", "nodes_static.yaml"} | SHARDED == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / name))
    assert config.num_processes == 1 or config.num_processes % config.num_machines == 0
    assert f"--config_file recipes/launch/{name}" in (FOLDER / name).read_text(), "says how it is used"
    assert (config.distributed_type.value in ("FSDP", "DEEPSPEED")) == (name in SHARDED)


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_one_process_is_started_plainly(dry, name):
    started = dry(name)
    assert started.by == "process"
    assert started.cmd[1:] == SCRIPT
    assert started.env["ACCELERATE_USE_CPU"] == str(name == "cpu.yaml").capitalize()
    assert started.env.get("CUDA_VISIBLE_DEVICES") == (
        "0" if name == "gpu.yaml" else os.environ.get("CUDA_VISIBLE_DEVICES")
    )


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", *(f"{path.stem}.yaml" for path in JSONS)])
def test_a_node_gets_as_many_processes_as_asked_for(dry, name):
    started = dry(name, "--num_processes", "4")
    assert started.by == "torchrun"
    assert (started.args.nproc_per_node, started.args.nnodes) == ("4", "1:1")
    assert [started.args.training_script, *started.args.training_script_args] == SCRIPT
    engines = {key for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if key in started.env}
    assert engines == (
        set() if name == "ddp.yaml" else {f"ACCELERATE_USE_{'FSDP' if name == 'fsdp2.yaml' else 'DEEPSPEED'}"}
    )


def test_the_cpu_switch_reaches_the_processes(dry, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert dry("ddp.yaml").env["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("cpu", [True, False])
def test_what_fsdp2_starts_is_divided_by_the_loop_on_cpus_and_gpus(dry, monkeypatch, cpu):
    if cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    started = dry("fsdp2.yaml", "--num_processes", "2")
    assert started.env.get("ACCELERATE_USE_CPU", "false") == str(cpu).lower()
    assert started.env["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    for name, value in started.env.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType("MULTI_CPU" if cpu else "MULTI_GPU"), num_processes=1
    )
    check_engine(accelerator, LoopConfig())
    assert divided(accelerator)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_gets_its_own_json(dry, path):
    env = dry(f"{path.stem}.yaml").env
    assert Path(env["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).resolve() == path


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_nodes_find_their_head(dry, backend):
    options = ["--num_machines", "3", "--num_processes", "12", "--main_process_ip", "head", "--machine_rank", "2"]
    config, _, _ = torchrun.config_from_args(dry(f"nodes_{backend}.yaml", *options, "--rdzv_backend", backend).args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (3, 3, 4)
    assert (config.rdzv_backend, config.rdzv_endpoint) == (backend, "head:29500")
    assert config.rdzv_configs.get("rank") == (2 if backend == "static" else None)


def test_accelerate_takes_the_rendezvous_from_the_command_line_only(dry):
    """Why docs/launch.md has --rdzv_backend c10d; when this fails, it can go."""
    assert dry("nodes_c10d.yaml", "--main_process_ip", "head").args.rdzv_backend == "static"
    assert "nodes_c10d.yaml --rdzv_backend c10d" in (FOLDER / "nodes_c10d.yaml").read_text()


def test_the_hostfile_is_what_deepspeed_starts_nodes_from(dry, monkeypatch, tmp_path):
    monkeypatch.setattr("deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_NAME", str(tmp_path / "env"))
    started = dry("nodes_zero2.yaml", "--main_process_ip", "node1")
    assert started.cmd[: started.cmd.index("recipes/finetune.py")] == [
        "deepspeed", "--hostfile", "recipes/launch/hostfile", "--no_local_rank", "--launcher", "pdsh",
        "--num_gpus", "8", "--master_addr", "node1", "--master_port", "29500",
    ]  # fmt: skip
    from deepspeed.launcher.runner import fetch_hostfile

    slots = fetch_hostfile(str(FOLDER / "hostfile"))
    assert sum(slots.values()) == load_config_from_file(str(FOLDER / "nodes_zero2.yaml")).num_processes


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_reads_its_json(path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    values = json.loads(path.read_text())
    automatic = {  # what Accelerate writes in place of "auto"
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False},
    }  # fmt: skip
    assert {key for key, value in values.items() if "auto" in json.dumps(value)} == set(automatic)
    zero = DeepSpeedConfig({**values, **automatic}).zero_config
    assert zero.stage == int(path.stem[4])
    offloaded = {name for name in ("offload_optimizer", "offload_param") if getattr(zero, name) is not None}
    wanted = {"zero2_offload": {"offload_optimizer"}, "zero3_offload": {"offload_optimizer", "offload_param"}}
    assert offloaded == wanted.get(path.stem, set())
    assert zero.reduce_bucket_size == BUCKET, "the planner counts with this bucket"


def test_accelerate_would_refuse_a_config_with_a_typo(tmp_path):
    (tmp_path / "x.yaml").write_text((FOLDER / "ddp.yaml").read_text().replace("num_processes", "num_proceses"))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "x.yaml"))


def test_files_and_page_say_of_an_engine_what_the_loop_says():
    said = {name for name in CONFIGS if "NOT YET ACCEPTED" in (FOLDER / name).read_text()}
    assert said == {name for name in CONFIGS if refused(name)}
    page = (ROOT / "docs" / "launch.md").read_text()
    assert ("engine not yet accepted" in page) == bool(said)
    assert len(said) == 2


def refused(name: str) -> bool:
    """Whether the loop refuses what a launch config starts."""
    if name == "fsdp2.yaml":
        return False  # see test_what_fsdp2_starts_is_divided_by_the_loop_on_cpus_and_gpus
    config = load_config_from_file(str(FOLDER / name))
    path = (config.deepspeed_config or {}).get("deepspeed_config_file")
    plugin = SimpleNamespace(deepspeed_config=json.loads((ROOT / path).read_text()) if path else None)
    accelerator = SimpleNamespace(
        distributed_type=config.distributed_type, num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    try:
        check_engine(accelerator, LoopConfig())
    except UserError:
        return True
    return False


def test_the_page_has_a_command_for_every_file():
    page = (ROOT / "docs" / "launch.md").read_text()
    listed = subprocess.run(["git", "ls-files", "recipes/launch"], cwd=ROOT, capture_output=True, text=True).stdout
    files = [Path(line).relative_to("recipes/launch") for line in listed.splitlines()]
    assert len(files) > 15
    assert [str(f) for f in files if f.suffix != ".json" and str(f) not in page] == []
