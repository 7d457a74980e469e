"""The throughput benchmark counts what it says, at toy size; its speeds are looked at by nobody here."""

from __future__ import annotations

import json
import sys

import pytest

from llm_unlearn.plan.activations import BatchShape
from llm_unlearn.plan.operations import forward_operations
from llm_unlearn.plan.shape import read_shape


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("throughput")


def test_once_through_on_a_cpu(program, tmp_path, monkeypatch, capsys):
    tiny = {"hidden": 32, "layers": 2, "heads": 2, "kv": 1, "ff": 64, "vocab": 512}
    monkeypatch.setitem(program.SHAPES, "small", tiny)
    monkeypatch.setattr(program, "product_rate", lambda device, precision: 1e9)
    argv = ["--batch", "4", "--steps", "2", "--blocks", "2", "--variants", "plain,checkpointed"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *argv, "--out", str(tmp_path / "t.json")])
    program.main()
    content = json.loads((tmp_path / "t.json").read_text())
    assert set(content["median"]) == {"plain", "checkpointed"}
    assert all(len(blocks) == 1 for blocks in content["blocks"].values()), "the first warms up"
    plain, checkpointed = (content["blocks"][name][0] for name in ("plain", "checkpointed"))
    for one in (plain, checkpointed):
        assert one["utilisation"] == pytest.approx(one["flops_per_second"] / 1e9)
    # the same rows: nothing that is recomputed counts
    per_token = [one["flops_per_second"] / one["tokens_per_second"] for one in (plain, checkpointed)]
    assert per_token[0] == pytest.approx(per_token[1])
    lm = program.build("small")
    one_row = 3 * forward_operations(read_shape(lm), BatchShape(1, 8, 1, 1)) / 8
    assert 0.5 * one_row < per_token[0] < 2 * one_row
    assert str(tmp_path / "t.json") in capsys.readouterr().out


def test_shapes_have_the_weights_they_are_named_for(program):
    import torch

    with torch.device("meta"):
        sizes = {name: read_shape(program.build(name)).parameters for name in ("135m", "1b")}
    assert sizes == {"135m": 134_515_008, "1b": 1_235_814_400}  # as their model cards say
