"""What `llm-unlearn doctor` looks at."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util
from typing import Any

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "typer",
    "pydantic",
    "ruamel.yaml",
    "numpy",
    "scipy",
    "rouge-score",
    "rich",
    "safetensors",
    "pyarrow",
    "jinja2",
    "matplotlib",
)
FOR = {
    "datasets": "TOFU from the hub",
    "evaluate": "eval/metrics modules",
    "peft": "LoRA",
    "deepspeed": "ZeRO",
    "scikit-learn": "images: digits, sub-classes",
    "pillow": "images: folders and tables of them, reports",
    "tensorboard": "tracker",
}


def examine() -> dict[str, Any]:
    """Return versions, devices and problems, and the same as lines for people."""
    versions = {name: _version(name) for name in (*NEEDED, *FOR)}
    problems = [
        f"{name} is missing: pip install -c constraints.txt llm-unlearn" for name in NEEDED if versions[name] is None
    ]
    lines = [f"python {platform.python_version()} ({sys.executable})"]
    lines += [
        f"{name} {version or 'MISSING'}" + (f" (only for: {FOR[name]})" if name in FOR else "")
        for name, version in versions.items()
    ]
    devices = _devices() if versions["torch"] else {}
    lines += [f"{key}: {value}" for key, value in devices.items()]
    if util.find_spec("torchvision") and not devices.get("cuda devices"):
        problems.append("torchvision beside a CPU torch breaks transformers' imports: pip uninstall torchvision")
    if "WORLD_SIZE" in os.environ:
        problems.append(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set outside a launcher; unset it")
    lines += [f"problem: {text}" for text in problems] or ["no problems found"]
    return {"versions": versions, "devices": devices, "problems": problems, "lines": lines}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cuda devices": ", ".join(cuda) if cuda else "",
        "bf16 on cuda": bool(cuda) and torch.cuda.is_bf16_supported(),
        "cpu cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "hub": "offline (HF_HUB_OFFLINE=1)"
        if os.environ.get("HF_HUB_OFFLINE") == "1"
        else "online if the network allows",
    }
