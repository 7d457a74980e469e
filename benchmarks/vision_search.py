"""What makes small nets grok on CIFAR-10 and Fashion-MNIST? Every configuration tried, screened with a plain loop, then
the recipes that came of it run as they are, over three seeds.

    nice python benchmarks/vision_search.py --cifar DIR --fashion DIR

DIR: train.npz and test.npz of CIFAR-10 (here 5,000 + 2,000 of its images), the four idx files of Fashion-MNIST. What
the result file holds already is not run again. One thread. A seed draws training images, initial weights and order;
values by comma are all tried; batches of 100, betas .9 and .999, held out: 1,000 images. `until`: fit, post, end.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_unlearn.config import build_config, load_config
from llm_unlearn.data.image_sets import ImageConfig, image_corpus
from llm_unlearn.files import read_jsonl, write_atomic
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.curve import PRESETS, Point, normalise
from llm_unlearn.grok.detector import Report, detect, kinds
from llm_unlearn.grok.run import train_grok
from llm_unlearn.grok.schedule import eval_steps
from llm_unlearn.models.image_model import build_classifier
from llm_unlearn.models.image_nets import NetConfig
from llm_unlearn.study.store import environment
from llm_unlearn.train.config import OptimConfig
from llm_unlearn.train.optimizer import make_optimizer

CONFIGS = Path(__file__).resolve().parent.parent / "recipes/configs/grok"
RATIO, RISE = 5.0, 0.12  # what a seed is counted by, beside the phase
TEST, BATCH, CLASSES = 1000, 100, 10
KINDS = {"cifar": "cifar10", "fashion": "fashion_mnist"}
RECIPES = {"cifar10_subset.yaml": "cifar", "fashion.yaml": "fashion"}
COLUMNS = "data n size form net width alpha lr wd clip decay steps until seed".split()
TRIED = """
fashion 200  14    unit          cnn     8    1    0.003 0.3  1 matrices     500  end  0
fashion 200  14    unit          cnn     8,32 8,32 0.01  0.1  1 matrices     800  fit  0
fashion 200  14    unit          resnet8 8    1    0.003 0.3  1 matrices     300  end  0
fashion 200  14    unit          resnet8 8    8,16 0.003 0.1  0 matrices     400  fit  0
cifar   400  16    unit          cnn     8    1    0.003 0.3  1 matrices     500  end  0
cifar   400  16    unit          cnn     8,32 8,32 0.01  0.1  1 matrices     800  fit  0
cifar   400  16    unit          resnet8 8    1    0.003 0.3  1 matrices     300  end  0
cifar   400  16    unit          resnet8 8    8,16 0.003 0.1  0 matrices     400  fit  0
cifar   400  8     gray          cnn     8    1    0.003 0.3  1 matrices     500  end  0
cifar   400  8     gray          cnn     8,32 8,32 0.01  0.1  1 matrices     800  fit  0
cifar   400  8     gray          resnet8 8    1    0.003 0.3  1 matrices     300  end  0
cifar   400  8     gray          resnet8 8    8,16 0.003 0.1  0 matrices     400  fit  0
cifar   400  16    unit          cnn     8    8    0.01  0.3  1 matrices,all 2500 post 0
cifar   400  16    unit          cnn     16,8 16   0.01  0.3  1 matrices     2500 post 0
cifar   1000 16    unit          cnn     16   12   0.01  0.3  1 matrices     2500 post 0
cifar   1000 16    unit          cnn     16   16   0.003 1    1 matrices     2000 post 0
cifar   400  16    unit          cnn     8    8    0.003 0.3  1 matrices     4000 post 0
fashion 400  10    unit          resnet8 8    8    0.003 0.3  0 matrices     3500 post 0
fashion 100  14    unit          cnn     8    16   0.003 0.3  1 matrices     4000 post 0
cifar   400  16    unit          cnn     8    32   0.01  0.3  1 matrices     2500 post 0
cifar   400  16    standard      cnn     8    16,8 0.01  0.3  1 matrices     2500 post 0
cifar   1000 16    unit          cnn     8    16   0.01  0.3  1 matrices     2500 post 0
cifar   400  10    unit          cnn     8    16   0.01  0.3  1 matrices     2500 post 0
cifar   300  8     unit          resnet8 8    8    0.003 0.3  0 matrices     2500 post 0
cifar   400  8     unit          resnet8 16   4    0.003 0.3  1 matrices     1500 post 0
cifar   400  16    standard      cnn     8    16   0.01  0.1  1 matrices     4000 post 0
cifar   600  16    standard      cnn     8    16   0.01  0.15 1 matrices     3000 post 0
cifar   400  16    standard      cnn     8    12   0.003 0.3  1 matrices     4000 post 0
cifar   600  16    standard      cnn     12   16   0.01  0.2  1 matrices     2500 post 0
cifar   300  16    standard      cnn     8    12   0.01  0.2  1 matrices     2500 post 0
cifar   400  16,24 standard      cnn     8    16   0.003 0.6  1 matrices     2800 post 0,1
cifar   500  24    standard      cnn     8    16   0.003 1    1 matrices     2000 post 0
fashion 200  14    unit,standard cnn     8    16   0.003 0.6  1 matrices     2800 post 0
fashion 100  14    unit          cnn     8    16   0.003 0.6  1 matrices     2800 post 1
fashion 400  14    standard      cnn     8    16   0.003 0.5  1 matrices     3000 post 0
cifar   400  16    standard      cnn     8    1    0.003 0.3  1 matrices     600  end  0
fashion 200  14    standard      cnn     8    1    0.003 0.3  1 matrices     600  end  0
cifar   500  16    standard      cnn     6    16   0.003 0.5  1 matrices     3200 post 0
fashion 200  10    standard      resnet8 8    8    0.003 0.3  0 matrices     2000 post 0
fashion 200  14    standard      cnn     8    16   0.003 0    1 matrices     2000 end  0
cifar   400  16    standard      cnn     8    16   0.003 0    1 matrices     2500 end  0
fashion 200  10    standard      resnet8 8    8    0.002 0.3  1 matrices     2000 post 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/vision_search"), help="folder of the recipes' runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vision_search.json"))
    args = parser.parse_args()
    os.environ["LLM_UNLEARN_QUIET"] = "1"
    torch.set_num_threads(1)
    paths = {"cifar": args.cifar, "fashion": args.fashion}
    held = json.loads(args.out.read_text()) if args.out.exists() else {"screened": [], "recipes": []}
    known = {row["config"]: row for row in (*held["screened"], *held["recipes"])}
    screened, recipes = [], []
    for config in (" ".join(one) for line in TRIED.strip().splitlines() for one in product(*map(listed, line.split()))):
        screened.append(known.get(config) or {"config": config, **screen(config, paths)})
        told(screened[-1])
    for name in filter(lambda name: (CONFIGS / name).exists(), RECIPES):
        for seed in range(3):
            config = f"{name} seed {seed}"
            recipes.append(known.get(config) or {"config": config, **confirm(name, seed, args.runs, paths)})
            told(recipes[-1])
    content = {
        "what": f"grokking on natural images; counted: ratio >= {RATIO:g}, rise >= {RISE:g}, phase grok*",
        "command": "python benchmarks/vision_search.py --cifar DIR --fashion DIR",
        "columns": COLUMNS, "screened": screened, "recipes": recipes, "environment": environment(),
    }  # fmt: skip
    write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())


def screen(config: str, paths: dict[str, str]) -> dict[str, Any]:
    """Train by a plain loop until the kind `until` (end: all steps) with what the detector says of it."""
    c = dict(zip(COLUMNS, config.split(), strict=True))
    seed, until = int(c["seed"]), c["until"]
    (x, y), (xt, yt) = images(c["data"], int(c["n"]), int(c["size"]), c["form"], seed, paths[c["data"]])
    started = time.process_time()
    net = build_config(NetConfig, {"arch": c["net"], "width": int(c["width"]), "alpha": float(c["alpha"])})
    model = build_classifier(net, tuple(x.shape[1:]), CLASSES, seed)
    given = {"lr": float(c["lr"]), "weight_decay": float(c["wd"]), "clip": float(c["clip"]), "decay": c["decay"]}
    optim = build_config(OptimConfig, {**given, "betas": [0.9, 0.999]})
    optimizer = make_optimizer(model, optim)
    due, curve = set(eval_steps(int(c["steps"]), 1.05, 25, 25)), list[Point]()
    draw = torch.Generator().manual_seed(seed + 1)
    order = iter(())
    for step in range(1, int(c["steps"]) + 1):
        if (at := next(order, None)) is None:
            order = iter([part for part in torch.randperm(len(x), generator=draw).split(BATCH) if len(part) == BATCH])
            at = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        if step in due:
            (right, loss), (tested, test_loss) = scored(model, x, y), scored(model, xt, yt)
            curve.append(Point(step, right, normalise(tested, 1 / CLASSES), loss, test_loss))
            if until in kinds(detect(curve, PRESETS["vision"])):
                break
    report = detect(curve, PRESETS["vision"])
    accuracies = [(p.step, p.acc * (1 - 1 / CLASSES) + 1 / CLASSES) for p in curve]
    return summary(report, accuracies, curve[-1].train_acc, time.process_time() - started)


def listed(values: str) -> list[str]:
    return values.split(",")


@torch.no_grad()
def scored(model: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = model(x)
    return (logits.argmax(1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


@functools.lru_cache(maxsize=4)
def images(data: str, n: int, size: int, form: str, seed: int, path: str) -> list[tuple[Tensor, Tensor]]:
    """Return pixels and labels of the training and the test images; `form`: unit, standard, gray."""
    by = "standard" if form == "standard" else "unit"
    given = {"train": n, "test": TEST, "size": size, "gray": form == "gray", "clusters": 1, "normalise": by}
    wanted = build_config(ImageConfig, given)
    corpus = image_corpus(KINDS[data], wanted, path, seed)
    rows = [corpus.splits[name] for name in ("train", "test")]
    names = corpus.meta["classes"]
    return [
        (torch.tensor(np.stack([r.pixels for r in part])), torch.tensor([names.index(r.answer) for r in part]))
        for part in rows
    ]


def confirm(name: str, seed: int, runs: Path, paths: dict[str, str]) -> dict[str, Any]:
    """Run the recipe itself."""
    out = runs / f"{Path(name).stem}-seed{seed}"
    given = [f"out={out}", f"seed={seed}", f"data.seed={seed}", f"scenario.seed={seed}"]
    result = train_grok(load_config(GrokConfig, CONFIGS / name, [*given, f"data.path={paths[RECIPES[name]]}"]))
    curve = read_jsonl(out / "curve.jsonl")
    accuracies = [(line["step"], line["held_out_acc"]) for line in curve]
    report = Report(**result["report"])
    return summary(report, accuracies, curve[-1]["train_acc"], result["cost"]["cpu_seconds"])


def summary(report: Report, accuracies: list[tuple[int, float]], train: float, cpu: float) -> dict[str, Any]:
    later = [acc for step, acc in accuracies if report.t_fit is not None and step >= report.t_fit]
    rise = max(later) - later[0] if later else None
    counted = rise is not None and rise >= RISE and (report.ratio or 0) >= RATIO and report.phase.startswith("grok")
    return {
        "t_fit": report.t_fit, "test_at_fit": later[0] if later else None,
        "best": max(later or [acc for _, acc in accuracies]),
        "last": float(np.mean([acc for _, acc in accuracies[-3:]])), "train_last": train,
        "t_gen": report.t_gen, "ratio": report.ratio, "rise": rise, "phase": report.phase, "loss_ok": report.loss_ok,
        "counted": counted, "steps": accuracies[-1][0], "cpu_seconds": cpu,
    }  # fmt: skip


def told(row: dict[str, Any]) -> None:
    shown = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "config"]
    print(f"{row['config']}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
