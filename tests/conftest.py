"""Shared fixtures: a small world, its tokenizer, and models made from a config. Offline, quiet, one thread."""

from __future__ import annotations

import os

# read when torch and huggingface_hub are first imported, so they have to be there before any test module is
os.environ.update(HF_HUB_OFFLINE="1", LLM_UNLEARN_QUIET="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import importlib.util
import sys
from pathlib import Path

import pytest

from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.source import make_tokenizer
from llm_unlearn.data.world import preset


@pytest.fixture(scope="session")
def load_benchmark():
    """A function NAME -> the module benchmarks/NAME.py."""

    def load(name: str):
        path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_program", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny_world():
    """The corpus of the smallest preset: 12 authors, 3 relations, 2 attributes."""
    return world_corpus(preset("world12"), "world12")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_world):
    """Its tokenizer: one token per name, relation word and phrase."""
    return make_tokenizer(tiny_world)


@pytest.fixture(scope="session")
def tiny_items(tiny_world, tiny_tokenizer):
    """Its training rows, encoded; their lengths differ."""
    from llm_unlearn.data.tokenise import encode_rows

    return encode_rows(tiny_tokenizer, tiny_world.split("train"))


@pytest.fixture
def make_lm(tiny_tokenizer):
    """A function seed -> randomly initialised 2-layer Llama of width 32 for the tiny world."""
    import torch

    from llm_unlearn.models.tiny import SIZES, build_tiny

    def make(seed: int = 0, **changes):
        torch.manual_seed(seed)
        shape = SIZES["nano"].model_copy(update=changes)
        return build_tiny(shape, len(tiny_tokenizer), tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id)

    return make


@pytest.fixture
def tiny_lm(make_lm):
    """One such model."""
    return make_lm()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data that is not part of the project (TOFU, published logs)."""
    folder = os.environ.get("LLM_UNLEARN_TEST_DATA")
    if not folder:
        pytest.skip("LLM_UNLEARN_TEST_DATA is not set: real data (tofu/, peer_logs/) is not here")
    return Path(folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI real data has to be there: a skip for want of it is a failure."""
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and os.environ.get("LLM_UNLEARN_REQUIRE_TEST_DATA")
        and "LLM_UNLEARN_TEST_DATA" in str(report.longrepr)
    ):
        report.outcome = "failed"
