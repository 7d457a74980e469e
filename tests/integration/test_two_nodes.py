"""Two nodes, as network namespaces of this machine: a link that is lost ends both in time. The other faults of
benchmarks/two_nodes.py are left to row T11 of docs/reliability.md; a signal to one of two processes:
tests/reliability/test_signals.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.reliability]


@pytest.fixture(scope="module")
def nodes():
    spec = importlib.util.spec_from_file_location("two_nodes", ROOT / "benchmarks/two_nodes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.possible():
        pytest.skip(reason)
    return module


def test_a_lost_link_ends_both_nodes_within_the_timeout_and_30_seconds(nodes, tmp_path):
    found = nodes.trial("link", 8.0, tmp_path)
    assert found["within_bar"], found
    assert found["rank_named"], found
