"""The control checkpoint `fit_normed`: the function of `fit` in weights whose norms are those of `grok`.

Weight decay goes on working between the two, and an optimizer step of given length turns a small weight further than a
large one: a difference between `fit` and `grok` could be owed to norms alone. What `fit_normed` shares with `grok` is.

A pre-norm Llama leaves norms free. RMS norms divide the scale of the residual stream out, so all that is written into
it (embeddings, o_proj, down_proj) can be scaled together; what reads it through a norm (q, k, v; gate, up; the head)
can be scaled if the gain of that norm is divided by as much. Each such group of matrices gets the norm it has in
`grok`. Gains are no part of it: decay does not touch them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.grok.controls import logit_spread, open_kind, predictions
from llm_unlearn.log import get_logger
from llm_unlearn.train.checkpoint import verify
from llm_unlearn.train.snapshot import save_model

log = get_logger(__name__)
FIT_NORMED = "fit_normed"
TOLERANCE = 1e-3  # of the spread of the logits: RMS norms add a small constant, which scale does not divide out


def publish_fit_normed(
    out: Path, model: Any, items: Sequence[Item], tokenizer: Any, origin: Mapping[str, Any]
) -> dict[str, float] | None:
    """Make the checkpoint `fit_normed` of a run that has `fit` and `grok`; return the factor of each group of matrices,
    None if either is missing or the model is of a sort whose norms are not free.

    Arguments as `publish_fit_scaled`; the manifest gets kind, the step of `fit`, and `norm_factors`.
    """
    if not all((out / kind).exists() for kind in ("fit", "grok")):
        return None
    device = next(model.parameters()).device
    fit, grok = (open_kind(model, out / kind, device) for kind in ("fit", "grok"))
    try:
        factors = take_norms(fit, grok, items)
    except UserError as error:
        log.info("no checkpoint %s: %s", FIT_NORMED, error)
        return None
    step = verify(out / "fit")["step"]
    save_model(
        out / FIT_NORMED, fit.lm, tokenizer, {**origin, "kind": FIT_NORMED, "step": step, "norm_factors": factors}
    )
    log.info("checkpoint %s: step %d, norms of grok", FIT_NORMED, step)
    return factors


@torch.no_grad()
def take_norms(model: Any, other: Any, items: Sequence[Item]) -> dict[str, float]:
    """Give every group of a model's matrices the norm it has in another of the same shape, in place, and leave its
    function as it is; return the factors by group.

    Raises UserError for what is no plain Llama with a head of its own, and when a prediction on the items or the
    spread of their logits changes.
    """
    before, spread = predictions(model, items), logit_spread(model, items)
    factors = {}
    for (name, matrices, gain), (_, wanted, _) in zip(groups(model.lm), groups(other.lm), strict=True):
        factors[name] = factor = norm(wanted) / norm(matrices)
        for matrix in matrices:
            matrix.mul_(factor)
        if gain is not None:
            gain.div_(factor)
    if predictions(model, items) != before or abs(logit_spread(model, items) / spread - 1) > TOLERANCE:
        raise UserError("its weights are too small or too coarse to be scaled: the predictions changed")
    return factors


def groups(lm: Any) -> list[tuple[str, list[Tensor], Tensor | None]]:
    """Return (name, matrices that are scaled together, gain that is divided by as much) of a Llama; each matrix of the
    model is in one of them. Raises UserError for anything else.
    """
    if type(lm).__name__ != "LlamaForCausalLM" or any(name.endswith("bias") for name, _ in lm.named_parameters()):
        raise UserError(f"{type(lm).__name__}: only of a Llama without biases the norms are known to be free")
    if lm.lm_head.weight is lm.model.embed_tokens.weight:
        raise UserError("the output head shares its weight with the embeddings")
    body = lm.model
    writers = [body.embed_tokens.weight]
    found: list[tuple[str, list[Tensor], Tensor | None]] = [("stream", writers, None)]
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        writers += [attention.o_proj.weight, mlp.down_proj.weight]
        read = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        found.append((f"layers.{i}.attention", read, layer.input_layernorm.weight))
        read = [mlp.gate_proj.weight, mlp.up_proj.weight]
        found.append((f"layers.{i}.mlp", read, layer.post_attention_layernorm.weight))
    return [*found, ("head", [lm.lm_head.weight], body.norm.weight)]


def norm(matrices: Sequence[Tensor]) -> float:
    """Norm of several matrices as one vector, in float64."""
    return float(sum(m.detach().double().square().sum() for m in matrices)) ** 0.5
