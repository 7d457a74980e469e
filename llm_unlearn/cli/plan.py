"""llm-unlearn plan: what a run will need, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.cli.evaluate import Json

PROBE_STEPS = 5
NAMES = {
    "one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3",
}  # fmt: skip
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "reference",
    "extra",
    "buffers",
    "step",
    "data",
    "heap",
    "ready",
    "peak",
)


def plan_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: loop.batch_size=8 model.size=10m.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config of a recipe (YAML).")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="grok, finetune or unlearn. Default: told by the config's keys or folder.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that share the batch (and, sharded, the model).")] = 1,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few real steps on this machine: time, and peak memory.")
    ] = False,
    probe_steps: Annotated[int, typer.Option(min=1, help="Steps that --probe times.")] = PROBE_STEPS,
    as_json: Json = False,
) -> None:
    """Say what a run will need: parameters, memory per process and engine, tokens, operations and, probed, time."""
    start_logging()
    from llm_unlearn.plan.probe import probe as measure
    from llm_unlearn.plan.table import make_plan
    from llm_unlearn.plan.workload import read_recipe

    name, values = read_recipe(config, overrides or [], recipe)
    plan: dict[str, Any] = make_plan(name, values, processes)
    if probe:
        measured = measure(name, values, probe_steps)
        seconds = measured["seconds_per_step"]
        plan["probe"] = {
            **measured,
            "run_seconds": seconds * plan["steps"],
            "tokens_per_second": plan["tokens"]["step"] / seconds,
            "operations_per_second": plan["operations"]["step"] / seconds,
        }
    print_json(plan) if as_json else _show(plan)


def _show(plan: dict[str, Any]) -> None:
    from rich.table import Table

    from llm_unlearn.report.tables import show

    typer.echo(f"{plan['recipe']}: {plan['parameters']:,} parameters, {plan['trainable']:,} trained")
    tokens, work = plan["tokens"], plan["operations"]
    typer.echo(f"at most {plan['steps']:,} steps of {plan['batch']['rows']} items ({tokens['step']:,} tokens)")
    typer.echo(f"{tokens['run']:.3g} tokens, {work['run']:.3g} operations in all ({work['step']:.3g} a step)")
    many = plan["processes"]
    table = Table(title=f"memory per process, MiB ({many} process{'es' if many > 1 else ''})", box=None)
    table.add_column("engine")
    for part in PARTS:
        table.add_column(part, justify="right")
    for engine, parts in plan["memory"].items():
        table.add_row(NAMES[engine], *(f"{parts[part] / 2**20:,.1f}" for part in PARTS))
    show([table])
    typer.echo("step: at once in a training step, on the accelerator; ready: a mask or targets made before the first.")
    typer.echo(
        "peak: of steps, saving, loading and getting ready, on a CPU, with the data and holes in glibc's heap (see "
        "docs/launch.md)."
    )
    typer.echo("Above what the libraries take; compared with measurements for one process.")
    if not plan["exact_shape"]:
        typer.echo("Not a Llama-style model: its activations are those of a Llama of that size, a rough guess.")
    if "probe" in plan:
        _show_probe(plan["probe"])


def _show_probe(found: dict[str, Any]) -> None:
    typer.echo(
        f"measured here, one process: {found['seconds_per_step']:.3g} s a step, so at most "
        f"{found['run_seconds'] / 60:.3g} min of steps (evaluation and saving come on top); "
        f"{found['tokens_per_second']:,.0f} tokens/s, {found['operations_per_second'] / 1e9:.3g} GFLOP/s"
    )
    if found["peak_bytes"] is not None:
        typer.echo(f"peak memory measured: {found['peak_bytes'] / 2**20:,.1f} MiB above the libraries' own")
