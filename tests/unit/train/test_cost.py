"""What a run took, by hand, and that it adds up over the processes of a run that was killed."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.data.batches import Batch
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train import cost as module
from llm_unlearn.train.checkpoint import commit
from llm_unlearn.train.cost import Meter, count_pass, counted_parameters, flops, start_clock, training_flops

tokens = st.integers(0, 10**9)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((100, 100, 10, 0), 2 * 100 * 10),  # an evaluation
        ((100, 100, 10, 10), 6 * 100 * 10),  # 6 N D of full training
        ((100, 100, 30, 10), 2 * 100 * 30 + 4 * 100 * 10),
        ((110, 10, 10, 10), (4 * 110 + 2 * 10) * 10),  # adapters: no gradient for the frozen weights
        ((100, 0, 10, 0), 2000),
    ],
)
def test_flops_by_hand(case, expected):
    assert flops(*case) == expected


@given(tokens, tokens, tokens, tokens, tokens, tokens)
def test_flops_add_up_over_passes_and_training_fewer_weights_is_never_dearer(n, part, a, b, c, d):
    part = min(part, n)
    assert flops(n, part, a, b) + flops(n, part, c, d) == flops(n, part, a + c, b + d)
    assert flops(n, part, a, b) <= flops(n, n, a, b)


def test_parameters_are_counted_without_embeddings_and_head(make_lm):
    lm = make_lm()
    width, layers, ff = lm.config.hidden_size, lm.config.num_hidden_layers, lm.config.intermediate_size
    heads, groups = lm.config.num_attention_heads, lm.config.num_key_value_heads
    attention = 2 * width * width + 2 * width * width * groups // heads
    by_hand = layers * (attention + 3 * width * ff + 2 * width) + width
    assert counted_parameters(lm) == (by_hand, by_hand)
    adapted = add_lora(make_lm(), LoraConfig(rank=2, targets=("q_proj",)))
    more = layers * 2 * (width + width)
    assert counted_parameters(adapted) == (by_hand + more, more)


def test_positions_are_a_table_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    lm = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    assert counted_parameters(lm)[0] == sum(p.numel() for p in lm.parameters()) - (50 + 32) * 8


def test_a_pass_without_gradients_has_no_backward_pass():
    none = torch.zeros(0, dtype=torch.long)
    counter, batch = Counter[str](), Batch(torch.zeros(2, 5, dtype=torch.long), none, none, none)
    count_pass(counter, batch)
    with torch.no_grad():
        count_pass(counter, batch)
    assert counter == {"forward": 20, "backward": 10}


def gold_run(folder, **cost):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": "grok", "step": 400, "cost": cost}))
    commit(folder / "final", lambda staging: (staging / "config.json").write_text("{}"), {"step": 400})
    commit(folder / "fit", lambda staging: (staging / "config.json").write_text("{}"), {"kind": "fit", "step": 100})
    return f"{folder}@fit"


def test_gold_is_charged_up_to_its_step(tmp_path):
    assert training_flops(gold_run(tmp_path / "a", flops=8000)) == 2000
    assert training_flops(str(tmp_path / "a")) == training_flops(f"{tmp_path}/a@final") == 8000
    assert training_flops(gold_run(tmp_path / "b")) is None, "a run of an older version counted none"
    assert training_flops(str(tmp_path / "a" / "fit")) is None
    assert training_flops(f"{tmp_path}/none@fit") is None
    assert training_flops(None) is None


def meter_of(counter, *, wall=0.0, cpu=0.0):
    started = start_clock()
    return Meter(Counter(counter), (started[0] - wall, started[1] - cpu))


def run_of(lm):
    return SimpleNamespace(lm=lm, seconds=3.0, step=7, accelerator=SimpleNamespace(num_processes=1))


def test_a_resumed_run_adds_up(make_lm):
    first = meter_of({"forward": 60, "backward": 40, "reference": 10}, wall=100, cpu=50)
    state = first.state_dict()
    first.tokens["forward"] += 1000  # lost with the process, and done again
    second = meter_of({"reference": 10}, wall=20, cpu=5)
    second.load_state_dict(state)
    second.tokens.update({"forward": 60, "backward": 40})
    watch = SimpleNamespace(tokens=30, seconds=2.0)
    found = second.cost(run_of(make_lm()), watch)
    n = counted_parameters(make_lm())[0]
    assert (found["updates"], found["train_seconds"], found["evaluation_seconds"]) == (7, 3.0, 2.0)
    assert [found[f"{k}_tokens"] for k in ("forward", "backward", "reference", "evaluation")] == [120, 80, 10, 30]
    assert (found["flops"], found["reference_flops"]) == (2 * n * 120 + 4 * n * 80, 2 * n * 10)
    assert found["evaluation_flops"] == 2 * n * 30
    assert found["seconds"] == pytest.approx(120, abs=5)
    assert found["cpu_seconds"] == pytest.approx(55, abs=5)
    assert found["peak_bytes"] > 10_000_000
    assert found["share_of_gold"] is None
    assert json.dumps(found, allow_nan=False)


def test_the_share_of_gold_is_training_and_reference_over_what_gold_took(make_lm, tmp_path):
    n = counted_parameters(make_lm())[0]
    gold = gold_run(tmp_path / "gold", flops=4 * 6 * n * 100)
    meter = meter_of({"forward": 5, "backward": 5, "reference": 15})
    found = meter.cost(run_of(make_lm()), SimpleNamespace(tokens=10**9, seconds=0.0), gold)
    assert found["share_of_gold"] == pytest.approx((30 + 30) / 600)


def test_processes_side_by_side_share_the_clock_and_nothing_else(make_lm, monkeypatch):
    def gather(objects):
        mine = objects[0]
        return [mine, {**mine, "seconds": mine["seconds"] + 10, "forward_tokens": 50, "train_seconds": 4.0}]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    run = run_of(make_lm())
    run.accelerator.num_processes = 2
    found = meter_of({"forward": 60}, cpu=7).cost(run)
    assert (found["forward_tokens"], found["train_seconds"]) == (110, 4.0)
    assert found["seconds"] == pytest.approx(10, abs=5)
    assert found["cpu_seconds"] == pytest.approx(14, abs=5)
    assert found["peak_bytes"] == pytest.approx(module.resident_peak(), rel=0.5)
