"""llm-unlearn ls, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_unlearn.cli.common import print_json
from llm_unlearn.cli.evaluate import Json

ls_app = typer.Typer(
    help="List methods, gradients, metrics, probes, suites, worlds, sizes of language models and nets of images.",
    no_args_is_help=True,
)


@ls_app.command("methods", epilog="Example: llm-unlearn ls methods --show npo")
def methods(
    show: Annotated[str | None, typer.Option(help="Print this method's whole card.")] = None, as_json: Json = False
) -> None:
    """Unlearning methods: formula, hyper-parameters, needs, cost, source; with --show all that is known of one."""
    from llm_unlearn.errors import UserError, suggest
    from llm_unlearn.methods.card import card, card_text, wrapper_card, wrapper_text, wrappers
    from llm_unlearn.methods.table import METHODS

    if show in wrappers():
        print_json(wrapper_card(wrappers()[show])) if as_json else typer.echo(wrapper_text(wrappers()[show]))
        return
    if show is not None:
        if show not in METHODS:
            raise UserError(f"unknown method '{show}' in --show{suggest(show, METHODS)}")
        print_json(card(METHODS[show])) if as_json else typer.echo(card_text(METHODS[show]))
        return
    cards = [card(method) for method in METHODS.values()]
    if as_json:
        print_json(cards)
        return
    rows = [{**c, "knobs": {name: f"{knob['default']:g}" for name, knob in c["knobs"].items()}} for c in cards]
    _print(rows, as_json, ("name", "kind", "retain", "knobs", "cost", "memory", "source"))
    typer.echo("cost: an update in updates of fine-tuning. The whole card: llm-unlearn ls methods --show NAME")


@ls_app.command("gradients")
def gradients(as_json: Json = False) -> None:
    """Wrappers of gradients, for any method with both terms: formula, passes over forget and retain batch, source."""
    from llm_unlearn.methods.gradients import GRADIENTS

    rows = [
        {
            "name": g.name,
            "formula": g.formula,
            "params": {name: knob.default for name, knob in g.params.items()},
            "passes": {"forget": g.passes[0], "retain": g.passes[1]},
            "memory": g.memory,
            "source": g.source,
            "note": g.note,
            "failure": g.failure,
        }
        for g in GRADIENTS.values()
    ]
    _print(rows, as_json, ("name", "formula", "params", "passes", "memory", "source"))


@ls_app.command("metrics")
def metrics(as_json: Json = False) -> None:
    """Metrics: unit, direction, source, cost."""
    from llm_unlearn.eval.metrics.table import METRICS

    keys = ("name", "unit", "direction", "source", "version", "cost", "help")
    _print(
        [{key: getattr(m, key) for key in keys} for m in METRICS.values()],
        as_json,
        ("name", "unit", "direction", "source", "help"),
    )


@ls_app.command("probes")
def probes(as_json: Json = False) -> None:
    """Probes of a model's insides: formula, source, cost."""
    from llm_unlearn.eval.probes.table import PROBES

    keys = ("name", "formula", "source", "cost", "help")
    _print([{key: getattr(p, key) for key in keys} for p in PROBES.values()], as_json, keys)


@ls_app.command("suites")
def suites(as_json: Json = False) -> None:
    """Suites: which metrics on which splits."""
    from llm_unlearn.eval.suite import load_suite, suite_names

    rows = [
        {
            "name": name,
            "version": load_suite(name).config.version,
            "data": load_suite(name).config.data or "of the model",
            "metrics": list(load_suite(name).config.metrics),
            "splits": sorted(load_suite(name).splits()),
        }
        for name in suite_names()
    ]
    _print(rows, as_json, ("name", "version", "data", "splits", "metrics"))


@ls_app.command("worlds")
def worlds(as_json: Json = False) -> None:
    """Presets of the embedded world."""
    from llm_unlearn.data.world import PRESETS

    _print(
        [{"name": name, **config.model_dump()} for name, config in PRESETS.items()],
        as_json,
        ("name", "n_authors", "n_relations", "n_attributes", "phi", "answers"),
    )


@ls_app.command("sizes")
def sizes(as_json: Json = False) -> None:
    """Sizes of language models trained from scratch (`model.size`)."""
    from llm_unlearn.models.tiny import SIZES

    _print(
        [{"name": name, **config.model_dump()} for name, config in SIZES.items()],
        as_json,
        ("name", "hidden", "layers", "heads", "ff", "max_length"),
    )


@ls_app.command("nets")
def nets(as_json: Json = False) -> None:
    """Classifiers of images trained from scratch (`model.net`), with their weights at 8 x 8 gray pixels, 10 classes."""
    from llm_unlearn.models.image_model import build_classifier
    from llm_unlearn.models.image_nets import WIDTHS, NetConfig

    rows = []
    for arch in WIDTHS:
        config = NetConfig.model_validate({"arch": arch})
        net = build_classifier(config, (1, 8, 8), 10, 0)
        shape = config.resolved()
        rows.append(
            {
                "name": arch,
                "width": shape["width"],
                "blocks": net.n_layers,
                "heads": shape["heads"],
                "weights": sum(p.numel() for p in net.parameters()),
                "operations": 2 * net.macs_per_image(),
            }
        )
    _print(rows, as_json, ("name", "width", "blocks", "heads", "weights", "operations"))
    if not as_json:
        typer.echo("operations: of one image's forward pass, 2 a multiplication. All grow with the images.")


def doctor_command(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and which devices there are; exit 1 if something needed is missing."""
    from llm_unlearn.cli.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        for line in found["lines"]:
            typer.echo(line)
    if found["problems"]:
        raise typer.Exit(1)


def _print(rows: list[dict], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, show_lines=False)
    for row in rows:
        table.add_row(*(_text(row[c]) for c in columns))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("[", r"\[")
