"""Properties of every loss in the table over random ragged batches: finite, order-free, blind to padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.methods.hidden import control_vector
from llm_unlearn.methods.losses import IGNORE, sum_by_row, token_logprobs
from llm_unlearn.methods.spec import input_names
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import RETAIN_TERMS

TERMS = {f"forget_{m.name}": m.forget for m in METHODS.values() if m.forget}
TERMS |= {f"retain_{name}": term.fn for name, term in RETAIN_TERMS.items() if term.fn}
TERMS = {name: fn for name, fn in TERMS.items() if input_names(fn) != ("weights",)}  # that reads no batch
V, H = 13, 5
RUNS = ("", "ref_", "bad_", "idk_", "ref_idk_", "alt_", "ref_alt_", "rl_")
KNOBS = {"forget_nabla_tau": {"target": 4.0}}  # its default asks the objective for one

ragged = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=6)
seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.01, 1.0, 30.0])


def padded_batch(shape: list[tuple[int, int, int]], seed: int, scale: float) -> dict[str, torch.Tensor]:
    """Eight runs (model, start model, untrained model, the first two on refusals and on alternates, the model on random
    answers) over prompts, answers and padding of random lengths.
    """
    g = torch.Generator().manual_seed(seed)
    width = max(sum(lengths) for lengths in shape)
    labels_BT = torch.full((len(shape), width), IGNORE)
    for row, (prompt, answer, _) in enumerate(shape):
        labels_BT[row, prompt : prompt + answer] = torch.randint(V, (answer,), generator=g)
    size = (len(shape), width)
    runs = {key: scale * torch.randn(*size, V, generator=g) for key in RUNS}
    states = {key: scale * torch.randn(*size, H, generator=g) for key in ("", "ref_")}
    return (
        {"labels": labels_BT}
        | {f"{k}logits": v for k, v in runs.items()}
        | {f"{k}hidden": v for k, v in states.items()}
    )


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, object]:
    """The whole vocabulary from one padded batch, as the objective would bind it."""
    mask_BT, n_rows = batch["labels"] != IGNORE, len(batch["labels"])
    row_N = mask_BT.nonzero()[:, 0]
    out: dict[str, object] = {"row_N": row_N, "n_rows": n_rows, "labels_N": batch["labels"][mask_BT]}
    for key in RUNS:
        logp_BT, _ = token_logprobs(batch[f"{key}logits"], batch["labels"])
        out |= {f"{key}logp_N": logp_BT[mask_BT], f"{key}logp_B": sum_by_row(logp_BT[mask_BT], row_N, n_rows)}
        out |= {f"{key}logits_NV": batch[f"{key}logits"][mask_BT], f"{key}len_B": mask_BT.sum(1)}
        out[f"{key}row_N"] = row_N
    other_BT = torch.where(mask_BT, (batch["labels"] + 1) % V, IGNORE)
    out["step_logp"] = out["logp_N"].detach().mean()
    out["generic_logp_N"] = token_logprobs(batch["logits"], other_BT)[0][mask_BT]
    for key in ("", "ref_"):
        out[f"{key}hidden_NH"] = batch[f"{key}hidden"][mask_BT]
    return out | {"control_H": control_vector(H, seed=0)}


def value_of(name: str, batch: dict[str, torch.Tensor], step: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Value of a term on a batch, which may be a part of the step's."""
    available = inputs(batch) | ({} if step is None else {"step_logp": inputs(step)["step_logp"]})
    return TERMS[name](**{key: available[key] for key in input_names(TERMS[name])}, **KNOBS.get(name, {}))


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(shape=ragged, seed=seeds, scale=scales)
def test_finite_scalar_whose_gradient_is_zero_outside_the_answer(name, shape, seed, scale):
    batch = padded_batch(shape, seed, scale)
    leaves = {key: value.requires_grad_() for key, value in batch.items() if key != "labels"}
    value = value_of(name, batch)
    assert value.shape == ()
    assert value.isfinite()
    value.backward()
    outside_BT = batch["labels"] == IGNORE
    grads = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    assert grads
    assert not any(key.startswith(("ref_", "bad_")) for key in grads)
    for grad in grads.values():
        assert grad.isfinite().all()
        assert (grad[outside_BT] == 0).all()


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(shape=ragged, seed=seeds, scale=scales, data=st.data())
def test_the_order_of_the_batch_does_not_matter(name, shape, seed, scale, data):
    batch = padded_batch(shape, seed, scale)
    order = data.draw(st.permutations(range(len(shape))))
    shuffled = {key: value[order] for key, value in batch.items()}
    torch.testing.assert_close(value_of(name, shuffled), value_of(name, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(shape=ragged, seed=seeds, extra=st.integers(1, 5), left=st.booleans())
def test_padding_on_either_side_does_not_matter(name, shape, seed, extra, left):
    batch = padded_batch(shape, seed, 1.0)
    wider = {}
    for key, value in batch.items():
        size = (len(shape), extra, *value.shape[2:])
        pad = torch.full(size, IGNORE) if key == "labels" else torch.randn(size)
        wider[key] = torch.cat([pad, value] if left else [value, pad], 1)
    torch.testing.assert_close(value_of(name, wider), value_of(name, batch))


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(shape=ragged.filter(lambda rows: len(rows) > 1), seed=seeds, data=st.data())
def test_micro_batches_weighed_by_what_the_term_averages_over_give_the_whole(name, shape, seed, data):
    kind, _, key = name.partition("_")
    over = METHODS[key].mean_over if kind == "forget" else RETAIN_TERMS[key].mean_over
    batch = padded_batch(shape, seed, 1.0)
    cut = data.draw(st.integers(1, len(shape) - 1))
    total = torch.tensor(0.0)
    count = 0
    for part in (slice(0, cut), slice(cut, None)):
        micro = {k: v[part] for k, v in batch.items()}
        weight = int((micro["labels"] != IGNORE).sum()) if over == "token" else len(micro["labels"])
        total, count = total + weight * value_of(name, micro, batch), count + weight
    torch.testing.assert_close(total / count, value_of(name, batch), rtol=1e-4, atol=1e-5)
