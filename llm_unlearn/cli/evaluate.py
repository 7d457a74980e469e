"""llm-unlearn eval, compare, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.errors import UserError
from llm_unlearn.log import get_logger

log = get_logger(__name__)
SHOWN = ("metrics", "identity", "cost", "collapse", "reference", "reference_identity", "run", "folder")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Scenario = Annotated[str | None, typer.Option(help="Which request, of a study of several.")]


class Format(StrEnum):
    """Prompt formats of `llm_unlearn.data.tokenise`."""

    auto, bare, plain, chat, openunlearning = "auto", "bare", "plain", "chat", "openunlearning"


def eval_command(
    model: Annotated[str | None, typer.Argument(help="A run, run@kind, a model folder, or a hub name.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suite: a name (llm-unlearn ls suites) or a YAML file. Default: tofu_world, for image models vision."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Gold: the model retrained without the forget set, as run@kind, folder or TOFU_EVAL.json."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results and records. Default: beside the model.")] = None,
    forget_split: Annotated[
        str | None,
        typer.Option(help="TOFU split (forget01, forget05, forget10) for a model that does not say; default forget10."),
    ] = None,
    tofu_dir: Annotated[
        Path | None, typer.Option(help="Folder with TOFU's JSONL files; without it the hub is asked.")
    ] = None,
    fmt: Annotated[
        Format | None,
        typer.Option("--format", help="Prompt format. Default: the model's own, its chat template, or the suite's."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data of another kind than the suite or the model names: muse-news, muse-books, wmdp, tofu ..."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with that data's JSONL files; without it the hub is asked.")
    ] = None,
    from_log: Annotated[
        Path | None,
        typer.Option(help="Compute the numbers of this TOFU_EVAL.json anew from its rows; runs no model."),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness to run too, by comma (arc_easy,hellaswag)."),
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval task files of your own; code they name is run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model, each number beside gold's and beside doing nothing."""
    start_logging()
    general = _task_names(lm_eval, lm_eval_include)
    if from_log is not None:
        if model is not None:
            raise UserError("give a model or --from-log, not both")
        if general:
            raise UserError("--lm-eval runs a model; give one in place of --from-log")
        _from_log(from_log, reference, out, as_json)
        return
    if model is None:
        raise UserError("give a model to evaluate, or --from-log TOFU_EVAL.json")
    from llm_unlearn.eval.evaluate import evaluate
    from llm_unlearn.eval.suite import load_suite
    from llm_unlearn.models.pretrained import read_origin
    from llm_unlearn.unlearn.start import open_start

    origin = read_origin(model)
    chosen = load_suite(suite or _usual_suite(origin))
    if tofu_dir or forget_split:
        data, data_dir = data or "tofu", data_dir or tofu_dir
    about = open_start(model, data_asked(data or chosen.config.data, data_dir, forget_split, origin), None)
    # on given splits nothing was asked to be forgotten that a reference could have seen
    if reference is not None and not reference.endswith(".json") and not about.corpus.given:
        _check_reference(reference, about, origin)
    result = evaluate(
        model,
        chosen,
        about.corpus,
        about.request,
        fmt=fmt.value if fmt else format_of(model, origin, chosen.config.format),
        gold=reference,
        start=origin.get("start"),
        out=out,
        run=_facts(model, origin),
        lm_eval=general,
        lm_eval_include=lm_eval_include,
    )
    if not result:  # another process of the launcher tells
        return
    if as_json:
        print_json({key: result[key] for key in SHOWN})
        return
    _show(result)


def _usual_suite(origin: dict[str, Any]) -> str:
    from llm_unlearn.data.source import IMAGE_KINDS

    kind = (origin.get("config", {}).get("data") or {}).get("kind")
    return "vision" if kind in IMAGE_KINDS else "tofu_world"


def _check_reference(reference: str, about: Any, origin: dict[str, Any]) -> None:
    from llm_unlearn.models.pretrained import read_origin
    from llm_unlearn.train.origin import check_same_request, gold_kind, request_digest

    gold, request = read_origin(reference), request_digest(about.corpus, about.request)
    if origin or gold:
        check_same_request(reference, gold, about.data_digest, request, gold_kind(origin))
    else:
        log.warning("reference %s: does not say what it was trained on, taken at your word", reference)


def _show(result: dict[str, Any]) -> None:
    from llm_unlearn.report.tables import metrics_table, show

    show([metrics_table(result)])
    for sign in result["collapse"]:
        typer.echo(f"collapsed: {sign}; no forget score of this model means anything")
    typer.echo(f"results: {result['folder']}/results.json")


def data_asked(kind: str | None, folder: Path | None, forget_split: str | None, origin: dict[str, Any]) -> Any:
    """Return the config of the data asked for, None for the model's own."""
    from llm_unlearn.config import build_config
    from llm_unlearn.data.source import DataConfig

    if kind is None:
        if folder is not None:
            raise UserError("--data-dir does not say what data it holds; give --data too (tofu, muse-news, wmdp ...)")
        return None
    own = origin.get("config", {}).get("data") or {}
    given = {"kind": kind, "path": None if folder is None else str(folder), "forget_split": forget_split}
    given = {key: value for key, value in given.items() if value is not None}
    return build_config(DataConfig, {**(own if own.get("kind") == kind else {}), **given})


def _task_names(text: str | None, include: Path | None) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if not names and (text is not None or include is not None):
        raise UserError("--lm-eval: no task named; give for example --lm-eval arc_easy,hellaswag")
    return names


def _from_log(log: Path, reference: str | None, out: Path | None, as_json: bool) -> None:
    from llm_unlearn.eval.relog import evaluate_log
    from llm_unlearn.report.tables import metrics_table, show

    result = evaluate_log(log, None if reference is None else Path(reference), out)
    if as_json:
        print_json({key: result[key] for key in ("metrics", "identity", "cost")})
        return
    show([metrics_table(result)])


def compare_command(
    paths: Annotated[list[Path], typer.Argument(help="Folders with evaluated runs (searched) or results.json files.")],
    by: Annotated[str, typer.Option(help="Put side by side: checkpoint or method.")] = "checkpoint",
    baseline: Annotated[str | None, typer.Option(help="Group the others are contrasted with; default fit.")] = None,
    scenario: Scenario = None,
    as_json: Json = False,
) -> None:
    """Put checkpoints side by side under the same method, scenario and seed, with paired differences; the contrast that
    a study declared beforehand (`primary`) is judged apart from all others.
    """
    from llm_unlearn.eval.compare import compare
    from llm_unlearn.eval.outcome import load_outcomes, of_scenario
    from llm_unlearn.report.tables import as_json as comparison_json
    from llm_unlearn.report.tables import comparison_tables, show

    outcomes = load_outcomes(paths)
    comparison = compare(outcomes if scenario is None else of_scenario(outcomes, scenario), by, baseline)
    if as_json:
        print_json(comparison_json(comparison))
        return
    show(comparison_tables(comparison))


def report_command(
    paths: Annotated[list[Path], typer.Argument(help="Folders with runs or studies.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    scenario: Scenario = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: curves, comparison, answers before and after."""
    start_logging()
    from llm_unlearn.report.html import write_report

    written = write_report(paths, out, scenario)
    if as_json:
        print_json({"report": str(written)})
        return
    typer.echo(f"report: {written}")


def format_of(model: str, origin: dict[str, Any], of_suite: str) -> Any:
    """Return the prompt format of a model: the one it was trained with, its chat template, or the suite's."""
    from llm_unlearn.models.pretrained import load_tokenizer

    if origin.get("config"):
        return (origin["config"].get("data") or {}).get("format", "auto")
    return "auto" if load_tokenizer(model).chat_template else of_suite


def _facts(model: str, origin: dict[str, Any]) -> dict[str, Any]:
    from llm_unlearn.files import read_json
    from llm_unlearn.models.pretrained import locate, read_origin
    from llm_unlearn.unlearn.facts import comparison_facts, study_facts

    done = Path(locate(model)).parent / "run.json"
    if origin.get("kind") != "unlearned" or not done.exists():
        return {}
    return {**comparison_facts(read_json(done), read_origin(origin["start"])), **study_facts(done.parent)}
