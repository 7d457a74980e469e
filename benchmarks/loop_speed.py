"""Our training loop against transformers' Trainer: same tiny model, same data, same batch, one run, in turn.

    python benchmarks/loop_speed.py --out benchmarks/results/loop_speed.json

Three ways of one step: Trainer; our loop with the vocabulary computed at every position, as Trainer does; our loop as
shipped, which computes it at answer positions only. Blocks of steps alternate, so a machine that changes speed changes
all three; the ratio is taken block by block and the median quoted. Runs on a GPU too, if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("LLM_UNLEARN_QUIET", "1")


def build(seed: int):
    import torch

    from llm_unlearn.data.qa import pieces, world_corpus
    from llm_unlearn.data.tokenise import encode_rows, pieces_tokenizer
    from llm_unlearn.data.world import preset
    from llm_unlearn.models.tiny import SIZES, build_tiny

    corpus = world_corpus(preset("world40"))
    tokenizer = pieces_tokenizer(pieces(preset("world40")))
    torch.manual_seed(seed)
    lm = build_tiny(SIZES["world"], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    return lm, tokenizer, encode_rows(tokenizer, corpus.split("train"))


class FullLogitsTask:
    """Our task with logits at every position, so that only the loop differs from Trainer's."""

    def __init__(self, task):
        self.task, self.n_micro = task, task.n_micro

    def micro_batches(self, step):
        return self.task.micro_batches(step)

    def loss(self, model, micro):
        import torch

        batch, share = micro
        batch = batch.to(next(model.parameters()).device)
        logits = model.lm(input_ids=batch.inputs, use_cache=False).logits.flatten(0, 1)
        labels = torch.full_like(batch.inputs.flatten(), -100).index_put((batch.index_N,), batch.labels_N)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        return loss / batch.n_tokens * share, {}


def ours(steps: int, batch: int, full: bool) -> float:
    from llm_unlearn.models.causal import AnswerModel
    from llm_unlearn.train.config import LoopConfig, OptimConfig
    from llm_unlearn.train.loop import make_accelerator, train
    from llm_unlearn.train.tasks import FitTask, Place

    lm, tokenizer, items = build(0)
    task = FitTask(items, batch, 0, Place(), tokenizer.pad_token_id)
    loop = LoopConfig(max_steps=steps, batch_size=batch, log_every=50, save_every=10**6)
    accelerator = make_accelerator(loop, 1)
    started = time.perf_counter()
    train(AnswerModel(lm), FullLogitsTask(task) if full else task, OptimConfig(), loop, accelerator=accelerator)
    return steps / (time.perf_counter() - started)


def trainer(steps: int, batch: int, folder: str) -> float:
    import torch
    from transformers import Trainer, TrainingArguments

    lm, tokenizer, items = build(0)
    rows = [
        {"input_ids": list(map(int, item.ids)), "labels": [-100] * item.start + list(map(int, item.ids[item.start :]))}
        for item in items
    ]

    def collate(features):
        width = max(len(f["input_ids"]) for f in features)
        pad = lambda key, value: torch.tensor([f[key] + [value] * (width - len(f[key])) for f in features])  # noqa: E731
        ids = pad("input_ids", tokenizer.pad_token_id)
        mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features])
        return {"input_ids": ids, "attention_mask": mask, "labels": pad("labels", -100)}

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-3,
        weight_decay=1.0,
        adam_beta2=0.98,
        warmup_steps=50,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )
    runner = Trainer(model=lm, args=arguments, train_dataset=rows, data_collator=collate)
    started = time.perf_counter()
    runner.train()
    return steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loop_speed.json"))
    args = parser.parse_args()
    import tempfile

    import torch

    from llm_unlearn.study.store import environment

    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    speeds = {"trainer": [], "ours_full_logits": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for block in range(args.blocks + 1):
            got = {
                "trainer": trainer(args.steps, args.batch, folder),
                "ours_full_logits": ours(args.steps, args.batch, True),
                "ours": ours(args.steps, args.batch, False),
            }
            if block:  # the first block warms up
                for name, value in got.items():
                    speeds[name].append(value)
    ratios = {
        name: [a / b for a, b in zip(speeds[name], speeds["trainer"], strict=True)]
        for name in ("ours_full_logits", "ours")
    }
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    content = {
        "what": "training steps per second, our loop against transformers' Trainer, same model, data and batch",
        "command": f"python benchmarks/loop_speed.py --steps {args.steps} --blocks {args.blocks} "
        f"--batch {args.batch} --threads {args.threads}",
        "device": device,
        "threads": args.threads,
        "steps_per_second": speeds,
        "ratio_equal_logits": {
            "median": statistics.median(ratios["ours_full_logits"]),
            "min": min(ratios["ours_full_logits"]),
            "max": max(ratios["ours_full_logits"]),
        },
        "ratio_as_shipped": {
            "median": statistics.median(ratios["ours"]),
            "min": min(ratios["ours"]),
            "max": max(ratios["ours"]),
        },
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: content[key] for key in ("ratio_equal_logits", "ratio_as_shipped")}))


if __name__ == "__main__":
    main()
