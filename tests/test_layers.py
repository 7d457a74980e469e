"""Imports go one way. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_unlearn"
OUTSIDE = ("recipes", "data_prep", "eval", "benchmarks")

# a layer may import those before it; names in one entry do not know each other
LAYERS = [
    {"base"}, {"data"}, {"models"}, {"eval", "train"}, {"grok", "unlearn"}, {"attacks"}, {"study", "plan"}, {"report"},
    {"cli"},
]  # fmt: skip
BASE = {
    "config",
    "config_schema",
    "config_yaml",
    "errors",
    "files",
    "interrupt",
    "log",
    "resampling",
    "seeding",
    "stats",
    "usage",
}
LEAVES = {"methods"}  # imports torch only, so anyone may import it
HEAVY = {"datasets", "evaluate", "peft", "matplotlib", "pyarrow", "sklearn", "deepspeed", "lm_eval"}
METRICS_MAY = {"numpy", "scipy", "rouge_score", "llm_unlearn.eval.metrics"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports; `from a.b import c` gives a.b, and a.b.c where that is a module of ours."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                whole = ROOT.joinpath(*base.split("."), alias.name)
                yield f"{base}.{alias.name}" if whole.with_suffix(".py").exists() or whole.is_dir() else base
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes.extend([] if module_level else node.body)
        elif not (module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes.extend(ast.iter_child_nodes(node))


def layer_of(module: str) -> str | None:
    """The layer of one of our modules; None for what is no module of ours."""
    parts = module.split(".")
    if parts[0] != "llm_unlearn" or len(parts) == 1:
        return "base" if module == "llm_unlearn" else None
    return "base" if parts[1] in BASE else parts[1]


def height(layer: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if layer in names)


OURS = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py"))
ids = [name_of(path) for path in OURS]


def test_there_is_something_to_check():
    assert len(OURS) > 50
    assert len(SCRIPTS) > 5
    assert {path.parent.name for path in OURS} >= {"data", "models", "train", "eval", "grok", "unlearn", "methods"}


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_imports_go_one_way(path):
    mine = layer_of(name_of(path))
    assert mine in LEAVES | set().union(*LAYERS), f"{path}: put its layer into LAYERS"
    for module in imports(path):
        theirs = layer_of(module)
        if theirs is None or theirs in LEAVES or theirs == mine:
            continue
        assert mine not in LEAVES, f"methods import torch only, not {module}"
        assert height(theirs) < height(mine), f"{mine} may not import {module}"


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {m.split(".")[0] for m in imports(path, module_level=True)} & HEAVY


@pytest.mark.parametrize("path", [*OURS, *SCRIPTS], ids=name_of)
def test_nobody_imports_deepspeed_or_a_program(path):
    found = {module.split(".")[0] for module in imports(path)}
    assert "deepspeed" not in found
    assert not found & {*OUTSIDE, "tests"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=name_of)
def test_methods_import_torch_and_each_other(path):
    for module in imports(path):
        known = module.split(".")[0] in sys.stdlib_module_names | {"torch"} or module.startswith("llm_unlearn.methods")
        assert known, module


@pytest.mark.parametrize("path", sorted((PACKAGE / "eval" / "metrics").glob("*.py")), ids=name_of)
def test_metrics_never_see_a_model(path):
    for module in imports(path):
        allowed = any(module == name or module.startswith(f"{name}.") for name in METRICS_MAY)
        assert allowed or module.split(".")[0] in sys.stdlib_module_names, module


def test_the_rules_bite(tmp_path, monkeypatch):
    """The reader sees imports inside functions, knows module level from below, and modules of ours by name."""
    source = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport numpy as np\n"
        "if TYPE_CHECKING:\n    import peft\nfrom llm_unlearn import data\n"
        "def f():\n    import datasets.load\n    from llm_unlearn.study import store\n"
        "class C:\n    import matplotlib\n"
    )
    path = tmp_path / "x.py"
    path.write_text(source)
    assert set(imports(path)) >= {"numpy", "peft", "llm_unlearn.data", "datasets.load", "llm_unlearn.study.store"}
    level = set(imports(path, module_level=True))
    assert {"numpy", "llm_unlearn.data", "matplotlib"} <= level
    assert not level & {"peft", "datasets.load", "llm_unlearn.study.store"}
    assert layer_of("llm_unlearn.study.store") == "study"
    assert layer_of("llm_unlearn.files") == "base"
    assert layer_of("numpy.random") is None
