"""Who holds what under each engine, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_unlearn.plan.activations import BatchShape, Pass, heap_holes, step_peak
from llm_unlearn.plan.memory import ENGINES, Beside, memory
from llm_unlearn.plan.shape import Shape

# 1,000 weights: two layers of 300, 400 outside of them
SHAPE = Shape(
    hidden=4, ff=6, layers=2, heads=2, vocab=10, q_width=4, kv_width=4, parameters=1000, trainable=1000,
    layer_parameters=300, layer_trainable=300, head_parameters=200, tied=False,
)  # fmt: skip
PASSES = [Pass(BatchShape(3, 5, 6, 2))]
UPDATES = [PASSES]


def test_one_process_holds_everything():
    found = memory(SHAPE, UPDATES, "one", 1, n_micro=2)
    assert (found.weights, found.gradients, found.optimizer, found.buffers) == (4000, 4000, 8000, 0)
    assert found.activations == step_peak(SHAPE, PASSES, gradients_kept=True)[0]
    assert found.step == 16_000 + found.activations
    # weights and moments, and a copy of them on the way to the file
    assert (found.saving, found.loading) == (24_000, 4000)
    assert found.peak == 24_000
    assert memory(SHAPE, UPDATES, "one", 1, n_micro=2, data=500).peak == 24_500


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer", "buffers"),
    [
        ("ddp", 4000, 4000, 8000, 4000),  # buckets: every gradient once more
        ("zero1", 4000, 4000, 3000, 8000),  # fp32 copy and moments, 12 x 1000 / 4; two buckets
        ("zero2", 4000, 1000, 3000, 8000),
        ("zero3", 1000, 1000, 3000, 4000 + 8000),  # two layers and the 400 outside, gathered
        ("fsdp2", 1000, 1000, 2000, 4000 + 4000),  # all is gathered at some time, its gradients too
    ],
)
def test_four_processes_share(engine, weights, gradients, optimizer, buffers):
    found = memory(SHAPE, UPDATES, engine, 4, n_micro=2)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.buffers == buffers


def test_mixed_precision_under_deepspeed_is_the_papers_sixteen_bytes():
    """Rajbhandari et al. 2020: 2 + 2 bytes per weight, 12 more of optimizer state (K = 12)."""
    found = memory(replace(SHAPE, autocast_bytes=2), UPDATES, "zero2", 1, n_micro=2)
    assert found.weights + found.gradients + found.optimizer == 16 * 1000


def test_adapters_train_little_and_need_no_copy_of_the_model():
    lora = replace(SHAPE, trainable=50, layer_trainable=25, adapted=frozenset({"q_proj"}), rank=2, base_trains=False)
    found = memory(lora, UPDATES, "one", 1, Beside(reference=True), n_micro=2)
    assert (found.weights, found.gradients, found.optimizer, found.reference) == (4000, 200, 400, 0)
    assert memory(SHAPE, UPDATES, "one", 1, Beside(reference=True)).reference == 4000


def test_holes_count_for_a_cpu_only():
    bare, holes = (memory(SHAPE, UPDATES, "one", 1, glibc=glibc) for glibc in (False, True))
    assert (bare.heap, holes.step) == (0, bare.step)
    assert holes.heap == heap_holes(SHAPE, PASSES) > 0
    assert holes.peak == max(holes.step + holes.heap, holes.saving)


def test_what_else_is_held():
    bare = memory(SHAPE, UPDATES, "one", 1)
    assert memory(SHAPE, UPDATES, "one", 1, Beside(grokfast=True)).step == bare.step + 4000
    best = memory(SHAPE, UPDATES, "one", 1, Beside(best=True))
    assert best.step == bare.step + 4000
    assert best.saving == bare.saving + 8000, "held, and copied to be written"
    assert memory(SHAPE, UPDATES, "one", 1, Beside(pretrained=True)).loading == 8000
    assert memory(SHAPE, UPDATES, "one", 1, Beside(pretrained=True, gold=True)).loading == 12_000, "the model stays"
    ready = memory(SHAPE, UPDATES, "one", 1, Beside(reference=True, ready=70_000))
    assert (bare.ready, ready.ready, ready.peak) == (0, 78_000, 78_000)


def test_a_mask_holds_a_byte_a_weight_and_the_values_it_freezes():
    bare, masked = memory(SHAPE, UPDATES, "one", 1), memory(SHAPE, UPDATES, "one", 1, Beside(frozen=0.25))
    assert masked.step == bare.step + 1000 + 1000
    assert masked.saving == bare.saving + 2 * 1000 + 1000, "which weights is saved, their values are in the weights"


def test_adapters_keep_the_best_of_themselves_only():
    lora = replace(SHAPE, trainable=50, layer_trainable=25, adapted=frozenset({"q_proj"}), rank=2, base_trains=False)
    bare, best = memory(lora, UPDATES, "one", 1), memory(lora, UPDATES, "one", 1, Beside(best=True))
    assert best.step == bare.step + 200
    assert bare.saving == 4000 + 400 + 200 + 400, "and save no more either"


def test_turns_need_what_the_larger_of_them_needs():
    """A forget batch of one row, a retain batch of three; moments for what either of them reaches."""
    low = [Pass(BatchShape(1, 5, 2, 2), "hidden", 1)]
    both, larger = memory(SHAPE, [low, PASSES], "one", 1), memory(SHAPE, UPDATES, "one", 1)
    assert both == larger
    assert memory(SHAPE, [[*low, *PASSES]], "one", 1).activations > larger.activations


def test_wrapped_steps_hold_whole_gradients():
    passes = [[Pass(BatchShape(3, 5, 6, 2)), Pass(BatchShape(3, 5, 6, 2), term="retain")]]
    bare = memory(SHAPE, passes, "one", 1)
    gru, sam = (memory(SHAPE, passes, "one", 1, Beside(wrapper=name)) for name in ("gru", "sam"))
    assert gru.extra == 4000, "the moving average"
    assert gru.saving == bare.saving + 8000
    assert sam.extra == 0
    assert (gru.activations, gru.gradients) == (0, 24_000)
    assert sam.gradients + sam.activations >= 16_000
    one, four = (memory(SHAPE, passes, "ddp", n, Beside(wrapper="orthograd")).gradients for n in (1, 4))
    assert (one, four) == (8 * 4000, (1 + 6 + 12) * 4000), "five at the end; own, stacked, and those of all processes"


def test_layers_that_no_loss_reads_have_no_gradient_and_no_moments():
    """1,000 weights less the upper layer's 300 and the head's 200."""
    low = [Pass(BatchShape(3, 5, 6, 2), "hidden", 1)]
    found = memory(SHAPE, [low], "one", 1, n_micro=2)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 2000, 4000)
    assert memory(SHAPE, [[*low, *PASSES]], "one", 1, n_micro=2).optimizer == 8000


def test_sharding_never_needs_more_of_the_state():
    states = {
        engine: sum(getattr(memory(SHAPE, UPDATES, engine, 8, n_micro=2), part) for part in ("weights", "gradients"))
        for engine in ENGINES
    }
    assert states["one"] == states["ddp"] == states["zero1"] > states["zero2"] > states["zero3"] == states["fsdp2"]


def test_a_step_alone_never_has_all_gradients_and_all_activations():
    once, _ = (step_peak(SHAPE, PASSES, gradients_kept=kept) for kept in (False, True))
    assert sum(once) <= sum(step_peak(SHAPE, PASSES, gradients_kept=True))
