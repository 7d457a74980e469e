"""How fast does fine-tuning run: tokens per second and the share of this machine's matrix products that it reaches.

    python benchmarks/throughput.py                                                # a CPU, a small Llama: does it run?
    python benchmarks/throughput.py --size 135m --precision bf16 --tofu-dir DIR    # what it is for: a GPU

The project's own loop, task and fused AdamW on TOFU's rows (or a made-up world's), weights drawn at random: speed does
not depend on them. Variants in turn, several times over, each from the same weights: as it is, with checkpointed
activations, with every layer compiled (torch.compile), with both. Utilisation is model FLOPs (forward and backward of
real tokens, no padding, nothing recomputed; arXiv:2204.02311, appendix B) per second by the best rate that a large
matrix product reaches here in the same precision. Sizes are shapes: 135m that of SmolLM2-135M, 1b that of Llama-3.2-1B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_UNLEARN_QUIET", "1")
SHAPES: dict[str, dict[str, int]] = {  # width, layers, query and key heads, MLP, vocabulary
    "small": {"hidden": 256, "layers": 4, "heads": 4, "kv": 2, "ff": 688, "vocab": 8192},
    "135m": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "ff": 1536, "vocab": 49152},
    "1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv": 8, "ff": 8192, "vocab": 128256},
}
VARIANTS = {"plain": (False, False), "checkpointed": (True, False), "compiled": (False, True), "both": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--tofu-dir", type=Path, help="default: rows of a made-up world, much shorter")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a block, after three to warm up")
    parser.add_argument("--blocks", type=int, default=3, help="of each variant, the first of which is not counted")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="by comma")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/throughput_SIZE_DEVICE.json")
    from llm_unlearn.errors import run_main

    run_main(lambda: measure(parser.parse_args()))


def measure(args: argparse.Namespace) -> None:
    import torch

    from llm_unlearn.files import write_atomic
    from llm_unlearn.study.store import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    items, pad = rows(args.tofu_dir)
    peak = product_rate(device, args.precision)
    names = args.variants.split(",")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for block in range(args.blocks):
        for name in names:
            one = run(args, items, pad, device, *VARIANTS[name])
            print(f"{name}: {one['tokens_per_second']:,.0f} tokens/s, {one['flops_per_second'] / peak:.1%}", flush=True)
            if block or args.blocks == 1:
                found[name].append({**one, "utilisation": one["flops_per_second"] / peak})
    content = {
        "what": "fine-tuning: real tokens per second, and model FLOPs by the rate of a large matrix product",
        "command": f"python benchmarks/throughput.py --size {args.size} --precision {args.precision} --batch "
        f"{args.batch} --steps {args.steps} --blocks {args.blocks}" + (" --tofu-dir DIR" if args.tofu_dir else ""),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "product_flops_per_second": peak,
        "median": {n: {k: statistics.median(b[k] for b in its) for k in its[0]} for n, its in found.items()},
        "blocks": found,
        "environment": environment(),
    }
    out = args.out or Path(f"benchmarks/results/throughput_{args.size}_{device}.json")
    write_atomic(out, (json.dumps(content, indent=1) + "\n").encode())
    print(out)


def rows(tofu: Path | None) -> tuple[Sequence[Any], int]:
    """Return encoded training rows and the padding id."""
    from llm_unlearn.config import build_config
    from llm_unlearn.data.source import DataConfig, make_tokenizer, open_corpus
    from llm_unlearn.data.tokenise import encode_rows

    values = {"kind": "tofu", "path": str(tofu)} if tofu else {"kind": "world", "preset": "world40"}
    corpus = open_corpus(build_config(DataConfig, values))
    tokenizer = make_tokenizer(corpus)
    return encode_rows(tokenizer, corpus.split("train")), tokenizer.pad_token_id


def build(size: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    s = SHAPES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=s["hidden"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
            num_key_value_heads=s["kv"], intermediate_size=s["ff"], vocab_size=s["vocab"], tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
    )  # fmt: skip


def run(args: Any, items: Sequence[Any], pad: int, device: str, checkpointed: bool, compiled: bool) -> dict[str, float]:
    """Train for a few steps; return what the last `args.steps` took."""
    import torch

    from llm_unlearn.models.causal import AnswerModel, decoder_layers
    from llm_unlearn.plan.activations import BatchShape
    from llm_unlearn.plan.operations import forward_operations
    from llm_unlearn.plan.shape import read_shape
    from llm_unlearn.train.config import LoopConfig, OptimConfig
    from llm_unlearn.train.loop import make_accelerator, train
    from llm_unlearn.train.tasks import FitTask, Place

    lm, clock, warm = build(args.size), Clock(device, args.steps), 3
    shape = read_shape(lm, args.precision)
    if compiled:
        for layer in decoder_layers(lm):
            layer.compile(dynamic=True)
    loop = LoopConfig(max_steps=warm + args.steps, batch_size=args.batch, log_every=10**6, save_every=10**6,
                      precision=args.precision, gradient_checkpointing=checkpointed)  # fmt: skip
    task = FitTask(items, args.batch, 0, Place(), pad)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train(AnswerModel(lm), task, OptimConfig(lr=1e-5), loop, accelerator=make_accelerator(loop, 1), callbacks=[clock])
    seen = [items[i] for step in range(warm, warm + args.steps) for i in task.drawn(step)["train"][0]]
    shapes = [BatchShape(1, len(item.ids) - 1, item.n_answer, item.n_answer) for item in seen]
    seconds = clock.times[-1] - clock.times[warm]
    return {
        "tokens_per_second": sum(one.tokens for one in shapes) / seconds,
        "flops_per_second": 3 * sum(forward_operations(shape, one) for one in shapes) / seconds,
        "step_seconds": seconds / args.steps,
        "peak_bytes": float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0,
    }


class Clock:
    """Notes when every step had ended on the device; times[k] is after k steps."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps, self.times = device, steps, list[float]()

    def __call__(self, run: Any) -> None:
        import torch

        if self.device == "cuda" and (run.step < 4 or run.step == self.steps + 3):  # in between nothing waits
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


def product_rate(device: str, precision: str, seconds: float = 2.0) -> float:
    """Return the best operations per second of a large square matrix product."""
    import torch

    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
