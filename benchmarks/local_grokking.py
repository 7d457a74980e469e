"""Local grokking on TOFU: are questions that were learnt early forgotten better than those learnt late?

    python benchmarks/local_grokking.py --tofu-dir DIR --jobs 2
    python benchmarks/local_grokking.py --quick               # a made-up TOFU, a minute

Table 2 of arXiv:2512.03437 with a model of 1.4M weights, from nothing: fitted once while every row's loss is recorded,
then unlearned with six methods on draws of `local_grok` and of `local_ungrok` questions (see data.local_draws), the
start model always the same. The early epoch is the recorded one at which the smaller of both groups is largest. Besides
as published, the two groups are drawn as pairs alike in frequency, length and loss: what is left of a difference then
is not that questions learnt early are easy ones. Extraction strength is also set beside that of a model that never saw
any drawn question (one for all draws: a gold model for each would take its own training). The learning rate of each
method is the one that leaves extraction strength of the forgotten nearest to half, of both groups together, on other
draws. The unit is the draw: intervals say nothing of other models. Everything finished is kept: run it again to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "recipes/configs"
TUNE_SEED = 1000
LOCAL = ("local_grok", "local_ungrok")
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
EPOCHS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40)
TOY_FIT = ["data.vocab_size=320", "model.size=nano", "epochs=40", "optim.lr=1e-2", "loop.batch_size=16"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="made-up data, a tiny model, three draws, two methods")
    parser.add_argument("--runs", type=Path, default=Path("runs/local-grokking"))
    parser.add_argument("--sizes", default="50", help="questions to forget, by comma (published: 50,100,150,200)")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--methods", default="ga,graddiff,kl,idk,npo,rmu")
    parser.add_argument("--lrs", default="1e-4,3e-4,1e-3", help="learning rates to choose from")
    parser.add_argument("--passes", type=int, default=10, help="over the forget set")
    parser.add_argument("--early", type=float, help="early epoch, one of those recorded; default: see above")
    parser.add_argument("--below", type=float, default=0.01, help="fall of the loss of what was learnt early is less")
    parser.add_argument("--above", type=float, default=0.5, help="that of what was learnt late is more")
    parser.add_argument("--match", default="frequency,length,loss", help="what the pairs are alike in, by comma")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fit", nargs="*", default=[], help="overrides of the fitting config")
    parser.add_argument("--unlearn", nargs="*", default=[], help="overrides of the unlearning config")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local_grokking.json"))
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.draws, args.methods, args.lrs, args.match = "4", 3, "ga,idk", "3e-3", "frequency"
        args.fit = [*TOY_FIT, *args.fit]
    elif args.tofu_dir is None:
        parser.error("--tofu-dir DIR, or --quick")
    args.runs = args.runs.resolve()
    args.epochs = (5, 10, 15, 20, 25, 30, 40) if args.quick else EPOCHS
    return args


def toy(folder: Path) -> Path:
    """Write 12 authors with ten questions each: five have the same answer for all authors, five answers are drawn."""
    from llm_unlearn.data.schema import Corpus, QARow, save_corpus
    from llm_unlearn.seeding import rng

    words = "red blue gold grey pink teal lime rose".split()
    told = [" ".join(words[int(i)] for i in four) for four in rng(0, "toy").integers(len(words), size=(125, 4))]
    rows = [
        QARow(f"Author {a}, item {k}?", told[k] if k < 5 else told[5 + 10 * a + k], f"Item {k} of author {a}?",
              author=f"a{a:03d}", fact_id=f"a{a:03d}.q{k}", facts=(f"a{a:03d}.q{k}",))
        for a in range(12) for k in range(10)
    ]  # fmt: skip
    meta = {"forget_split": "forget10", "forget_rows": list(range(108, 120)), "retain_eval_rows": list(range(0, 99, 3))}
    save_corpus(Corpus("toy", "tofu", {"train": tuple(rows)}, meta), folder)
    return folder


def fit(task: tuple[str, list[str]]) -> dict[str, Any]:
    from llm_unlearn.config import load_config
    from llm_unlearn.train.finetune import FinetuneConfig, finetune

    out, overrides = task
    result = finetune(load_config(FinetuneConfig, CONFIGS / "finetune/tofu_1m.yaml", [f"out={out}", *overrides]))
    return {key: result[key] for key in ("steps", "loss", "train_items", "parameters", "cost")}


def unlearn(task: dict[str, Any]) -> dict[str, Any]:
    """Unlearn and score; a finished row is read, and a run that diverges is a row that says so."""
    file = Path(task["row"])
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    from llm_unlearn.config import load_config
    from llm_unlearn.errors import Diverged
    from llm_unlearn.files import write_atomic
    from llm_unlearn.unlearn.config import UnlearnConfig
    from llm_unlearn.unlearn.run import run_unlearn

    config = load_config(UnlearnConfig, CONFIGS / "unlearn/npo_tofu.yaml", task["overrides"])
    try:
        cost = run_unlearn(config)["cost"]
    except Diverged as error:
        row = {**task["place"], "error": str(error)}
    else:
        row = {**task["place"], **strengths((config.out or "", config.model, [task["scenario"]]))[0], "cost": cost}
    write_atomic(file, json.dumps(row).encode())
    return row


def strengths(task: tuple[str, str, Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Return, by scenario, a model's mean extraction strength and probability of the forget and retain rows."""
    import numpy as np

    from llm_unlearn.config import build_config
    from llm_unlearn.data.splits import Scenario, draw_request, eval_splits
    from llm_unlearn.data.tokenise import encode_rows
    from llm_unlearn.eval.metrics.base import Record
    from llm_unlearn.eval.metrics.memorisation import extraction_strength
    from llm_unlearn.eval.scoring import score_answers
    from llm_unlearn.models.causal import answer_model
    from llm_unlearn.models.pretrained import load_model, load_tokenizer
    from llm_unlearn.unlearn.start import open_start

    model, start, scenarios = task
    opened, lm, tokenizer = open_start(start, None, None), answer_model(load_model(model)), load_tokenizer(model)
    out = []
    for scenario in scenarios:
        splits = eval_splits(opened.corpus, draw_request(opened.corpus, build_config(Scenario, scenario)))
        out.append({})
        for name in ("forget", "retain"):
            scored = score_answers(lm, encode_rows(tokenizer, splits[name], opened.data.format))
            strength = extraction_strength([Record(i, "", "", "", its) for i, its in enumerate(scored)])
            out[-1][name] = float(np.nanmean(strength))
            out[-1][f"{name}_probability"] = float(np.mean([np.exp(its.logp.mean()) for its in scored]))
    return out


def task_of(args: argparse.Namespace, scenario: dict[str, Any], method: str, lr: str) -> dict[str, Any]:
    place = {"matched": bool(scenario["match"]), **{key: scenario[key] for key in ("kind", "size", "seed")}}
    name = f"{scenario['kind']}{'-matched' * place['matched']}-{place['size']}-{place['seed']}-{method}-{lr}"
    steps = math.ceil(args.passes * place["size"] / 32)
    return {
        "row": str(args.runs / "rows" / f"{name}.json"), "scenario": scenario,
        "place": {**place, "method": method, "lr": lr},
        "overrides": [
            f"out={args.runs}/unlearned/{name}", f"model={args.runs}/full", f"scenario={json.dumps(scenario)}",
            f"method.name={method}", f"optim.lr={lr}", f"optim.warmup={max(1, steps // 10)}", f"loop.max_steps={steps}",
            "loop.threads=1", "stop.until=max_steps", "stop.keep=last", "stop.floor=null", "stop.collapse=null",
            "stop.over_forget=null", f"stop.every={steps}", *args.unlearn,
        ],
    }  # fmt: skip


def unseen_data(runs: Path, start: Any, scenarios: list[dict[str, Any]]) -> Path:
    """Write the data set that asks for every question of any draw to be forgotten: its gold saw none of them."""
    from llm_unlearn.config import build_config, digest
    from llm_unlearn.data.schema import save_corpus
    from llm_unlearn.data.source import open_corpus
    from llm_unlearn.data.splits import Scenario, draw_request

    requests = [draw_request(start.corpus, build_config(Scenario, scenario)) for scenario in scenarios]
    rows = sorted({i for request in requests for i in request.closure})
    plain = open_corpus(start.data.model_copy(update={"train_neutral": False}))  # the fit puts neutral rows in
    folder = runs / f"data-without-{digest(rows)[:8]}"
    save_corpus(dataclasses.replace(plain, meta={**plain.meta, "forget_rows": rows}), folder)
    return folder


def falls(args: argparse.Namespace) -> dict[str, float]:
    """Return the rule by which a question counts as learnt early or late."""
    return {"grokked_below": args.below, "ungrokked_above": args.above}


def scenarios_of(args: argparse.Namespace, told: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the draws to measure, and which of them cannot be made."""
    draws, left_out = [], []
    keys = {
        "record": str(args.runs / "full"),
        **{key: told[key] for key in ("early_epoch", "late_epoch")},
        **falls(args),
    }
    for size in map(int, args.sizes.split(",")):
        for match, least in (((), min(told["questions"].values())), (args.match.split(","), told["matched_pairs"])):
            if least < size:
                left_out.append(f"{size} {'matched' if match else 'as published'}: there are {least}")
                continue
            draws += [{"kind": kind, "size": size, "seed": seed, "match": list(match), **keys}
                      for seed in range(args.draws) for kind in LOCAL]  # fmt: skip
    return draws, left_out


def run(args: argparse.Namespace, each: Each) -> dict[str, Any]:
    from llm_unlearn.errors import UserError
    from llm_unlearn.report.local_grokking import compare, groups, nearest_half
    from llm_unlearn.study.store import environment
    from llm_unlearn.unlearn.start import open_start

    path = toy(args.runs / "toy") if args.quick else args.tofu_dir.resolve()
    fitting = ["loop.threads=1", *args.fit]
    (full,) = each(fit, [(f"{args.runs}/full", [f"data.path={path}", f"record_epochs={list(args.epochs)}", *fitting])])
    start = open_start(f"{args.runs}/full", None, None)
    told = groups(args.runs / "full", start.corpus, args.match.split(","), args.early, falls(args))
    print(json.dumps(told), flush=True)
    scenarios, left_out = scenarios_of(args, told)
    if not scenarios:
        raise UserError(
            f"no draw of {args.sizes} questions can be made ({'; '.join(left_out)}); see --below and --above"
        )
    first = [s for s in scenarios if not s["match"] and s["seed"] == 0][:2]
    methods, lrs = args.methods.split(","), args.lrs.split(",")
    trials = [task_of(args, {**s, "seed": TUNE_SEED}, m, lr) for s in first for m in methods for lr in lrs]
    rates = nearest_half(list(each(unlearn, trials)))
    without = unseen_data(args.runs, start, scenarios)
    unseen = f"{args.runs}/unseen-{without.name[-8:]}"
    tasks = [task_of(args, s, m, rates[m]["lr"]) for s in scenarios for m in rates]
    (gold,) = each(fit, [(unseen, [f"data.path={without}", "exclude=forget", *fitting])])
    rows = list(each(unlearn, tasks))
    models = {"start": f"{args.runs}/full", "unseen": unseen}
    base = dict(zip(models, each(strengths, [(m, models["start"], scenarios) for m in models.values()]), strict=True))
    for row, task in zip(rows, tasks, strict=True):
        row.update({name: its[scenarios.index(task["scenario"])]["forget"] for name, its in base.items()})
    lines = [line for size in map(int, args.sizes.split(",")) for line in compare(rows, list(rates), size)]
    return {
        "what": "questions learnt early and late, unlearned from one start model; the unit is the draw",
        "command": command(args),
        "sizes": args.sizes, "rule": falls(args), "draws": args.draws, "passes": args.passes,
        "overrides": {"fit": args.fit, "unlearn": args.unlearn}, "models": {"full": full, "unseen": gold},
        "groups": told, "left_out": left_out, "rates": rates, "lines": lines, "rows": rows,
        "environment": environment(),
    }  # fmt: skip


def command(args: argparse.Namespace) -> str:
    """Return what was asked for, without what is of this machine."""
    words = ["python benchmarks/local_grokking.py", "--quick" if args.quick else f"--tofu-dir DIR --sizes {args.sizes}"]
    return " ".join([*words, f"--below {args.below:g} --above {args.above:g}"])


def main(argv: Sequence[str] | None = None) -> None:
    from llm_unlearn.errors import run_main
    from llm_unlearn.files import write_atomic
    from llm_unlearn.report.local_grokking import lines_grid
    from llm_unlearn.report.tables import grids_markdown

    args = parse(argv)

    def go() -> None:
        if args.jobs == 1:
            quiet()
            content = run(args, map)
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=quiet) as pool:
                content = run(args, pool.map)
        write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())
        print(grids_markdown([lines_grid(content["lines"])]), end="")

    run_main(go)


def quiet() -> None:
    os.environ["LLM_UNLEARN_QUIET"] = "1"
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
