"""The `llm-unlearn` command. Heavy imports happen inside commands: `--help` answers at once."""

from __future__ import annotations

import typer

from llm_unlearn.cli.common import run_app
from llm_unlearn.cli.evaluate import compare_command, eval_command, report_command
from llm_unlearn.cli.listing import doctor_command, ls_app
from llm_unlearn.cli.plan import plan_command
from llm_unlearn.cli.probe import probe_command
from llm_unlearn.cli.quickstart import quickstart_command
from llm_unlearn.cli.study import study_app
from llm_unlearn.cli.tune import tune_command

app = typer.Typer(
    name="llm-unlearn",
    help="Train language models past grokking, make them forget, and measure it against a model that never knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 some cells failed, 2 wrong use. Results go to stdout, logs to stderr.",
)
app.command(
    "quickstart",
    epilog="Example: llm-unlearn quickstart --out quickstart; on images: llm-unlearn quickstart --vision --out q",
)(quickstart_command)
app.command(
    "eval",
    epilog="Example: llm-unlearn eval runs/world40/unlearn/grok/npo --suite tofu_world "
    "--reference runs/world40-gold@grok",
)(eval_command)
app.command("probe", epilog="Example: llm-unlearn probe runs/world40@grok --against runs/world40@fit --which cka")(
    probe_command
)
app.command("compare", epilog="Example: llm-unlearn compare studies/prepost --by checkpoint")(compare_command)
app.command("report", epilog="Example: llm-unlearn report studies/prepost --out report.html")(report_command)
app.command("plan", epilog="Example: llm-unlearn plan --config recipes/configs/grok/short40.yaml --probe")(plan_command)
app.command("tune", epilog="Example: llm-unlearn tune recipes/configs/study/leaderboard.yaml --jobs 2")(tune_command)
app.command("doctor")(doctor_command)
app.add_typer(study_app, name="study")
app.add_typer(ls_app, name="ls")


def main() -> None:
    """Entry point: wrong use becomes one line on stderr and exit code 2."""
    run_app(app)
