"""llm-unlearn probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.cli.evaluate import Format, Json, data_asked, format_of
from llm_unlearn.errors import UserError


def probe_command(
    model: Annotated[str, typer.Argument(help="A run, run@kind, a model folder, or a hub name.")],
    against: Annotated[
        str | None, typer.Option(help="A second model whose features are compared row by row (cka): run@kind, folder.")
    ] = None,
    which: Annotated[str | None, typer.Option(help="Probes by comma (llm-unlearn ls probes). Default: all.")] = None,
    items: Annotated[int, typer.Option(min=8, help="Most rows of a set that a probe reads.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every draw: rows, groups, directions.")] = 0,
    draws: Annotated[int, typer.Option(min=2, help="Resamples of the gradients' retain/retain null.")] = 20,
    layer: Annotated[int | None, typer.Option(help="The one layer whose features are compared. Default: all.")] = None,
    loss: Annotated[
        float | None,
        typer.Option(help="Mean loss, nats per token, that temperatures bring models to before curvature is taken."),
    ] = None,
    radius: Annotated[float, typer.Option(help="Radius of local complexity, absolute.")] = 0.005,
    relative_radius: Annotated[
        float, typer.Option(help="Radius of local complexity in mean lengths of the inputs.")
    ] = 0.05,
    float64: Annotated[bool, typer.Option("--float64", help="Local complexity in double precision.")] = False,
    data: Annotated[
        str | None, typer.Option(help="Data of a model that does not say what it was trained on: tofu, custom ...")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with that data's files.")] = None,
    forget_split: Annotated[str | None, typer.Option(help="TOFU split: forget01, forget05, forget10.")] = None,
    fmt: Annotated[Format | None, typer.Option("--format", help="Prompt format. Default: the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of probes.json. Default: beside the model.")] = None,
    as_json: Json = False,
) -> None:
    """Look into a model: gradients, local complexity, features, curvature, weights, each beside its null."""
    start_logging()
    from llm_unlearn.eval.probes.run import probe_model
    from llm_unlearn.eval.probes.table import Settings, choose
    from llm_unlearn.models.pretrained import read_origin
    from llm_unlearn.unlearn.start import open_start

    names = None if which is None else [name.strip() for name in which.split(",") if name.strip()]
    if names == []:
        raise UserError("--which: no probe named; give for example --which alignment,cka")
    choose(names)
    origin = read_origin(model)
    kind = data or ("tofu" if forget_split else None)
    about = open_start(model, data_asked(kind, data_dir, forget_split, origin), None)
    settings = Settings(items, seed, draws, layer, loss, radius, relative_radius, float64=float64)
    result: dict[str, Any] = probe_model(
        model,
        about.corpus,
        about.request,
        which=names,
        against=against,
        settings=settings,
        fmt=fmt.value if fmt else format_of(model, origin, "auto"),
        out=out,
    )
    if as_json:
        print_json(result)
        return
    from llm_unlearn.report.tables import probes_table, show

    show([probes_table(result)])
    typer.echo(f"probes: {result['folder']}/probes.json")
