"""Control checkpoints made from a run's own: what a difference between `fit` and `grok` has to be held against.

`fit_scaled` predicts what `fit` predicts with the logit spread of `grok`. Cross-entropy's gradients shrink as logits
grow, so whatever it shares with `grok` is owed to that scale and not to generalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.data.batches import collate, length_sorted
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.grok.tasks import at_answers
from llm_unlearn.log import get_logger
from llm_unlearn.train.checkpoint import verify
from llm_unlearn.train.snapshot import save_model

log = get_logger(__name__)
FIT_SCALED = "fit_scaled"
LAST = "last"
MAX_TOKENS = 2_048  # of a padded batch
TOLERANCE = 1e-4  # of the spread, after scaling


def publish_fit_scaled(
    out: Path, model: Any, items: Sequence[Item], tokenizer: Any, origin: Mapping[str, Any]
) -> float | None:
    """Make the checkpoint `fit_scaled` of a run that has `fit` and `grok`; return the factor of the logits, None if
    either is missing or the model's logits cannot be scaled by its weights (which is logged).

    Args:
        out: the run's folder.
        model: the trained model in its wrapper; checkpoints are loaded into others of the same classes.
        items: the training items whose logits are compared.
        tokenizer: saved beside the weights.
        origin: goes into the manifest, with kind, the step of `fit`, and `logit_factor`.
    """
    if not all((out / kind).exists() for kind in ("fit", "grok")):
        return None
    device = next(model.parameters()).device
    fit, grok = (open_kind(model, out / kind, device) for kind in ("fit", "grok"))
    try:
        factor = scale_to(fit, items, logit_spread(grok, items))
    except UserError as error:
        log.warning("no checkpoint %s: %s", FIT_SCALED, error)
        return None
    step = verify(out / "fit")["step"]
    meta = {**origin, "kind": FIT_SCALED, "step": step, "logit_factor": factor}
    save_model(out / FIT_SCALED, fit.lm, tokenizer, meta)
    log.info("checkpoint %s: step %d, logits times %.3g", FIT_SCALED, step, factor)
    return factor


def scale_to(model: Any, items: Sequence[Item], spread: float) -> float:
    """Scale a model's logits, in place, so that their spread over the items is `spread`; return the factor.

    Raises UserError when no weights scale them (see `scale_logits`), when the spread is missed by more than 1e-4 of it,
    or when a prediction on the items changes.
    """
    before = logit_spread(model, items)
    if not before > 0 or not spread > 0:
        raise UserError(f"the spread of the logits is {before:g} and is to be {spread:g}; want both positive")
    predicted, factor = predictions(model, items), spread / before
    scale_logits(model, factor, items)
    if abs(logit_spread(model, items) / spread - 1) > TOLERANCE or predictions(model, items) != predicted:
        raise UserError(
            f"scaling its head by {factor:g} does more to the model than that: its logits are capped, or its weights "
            "are too coarse (float32 is not)"
        )
    return factor


@torch.no_grad()
def scale_logits(model: Any, factor: float, items: Sequence[Item]) -> None:
    """Multiply a model's logits by a factor, in place, by its weights: those of the output head (weight and bias) or,
    where the head shares its weight with the embeddings, the gain (and bias) of the norm it reads, and its own bias.

    Which modules these are is seen from a pass over one item. Raises UserError when there are none.
    """
    head, read_from = _last_modules(model, items[:1])
    shared = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
    if id(head.weight) not in shared:
        scaled = [head.weight, head.bias]
    elif read_from is not None:
        scaled = [read_from.weight, getattr(read_from, "bias", None), head.bias]
    else:
        raise UserError("the output head shares its weight with the embeddings and reads no norm with a gain")
    for weight in scaled:
        if weight is not None:
            weight.mul_(factor)


def logit_spread(model: Any, items: Sequence[Item]) -> float:
    """Standard deviation of the logits over items, centred per answer token: sqrt(mean_NV (z - mean_V z)^2), in float64
    over the answer tokens of all items.
    """
    total, count = 0.0, 0
    for logits_NV in _logits(model, items):
        centred_NV = logits_NV.double() - logits_NV.double().mean(1, keepdim=True)
        total, count = total + float(centred_NV.square().sum()), count + centred_NV.numel()
    return (total / count) ** 0.5


def predictions(model: Any, items: Sequence[Item]) -> list[int]:
    """Return the likeliest token (class) at every answer token of the items, in the order they are read."""
    return list(chain.from_iterable(logits_NV.argmax(1).tolist() for logits_NV in _logits(model, items)))


@torch.no_grad()
def _logits(model: Any, items: Sequence[Item]) -> Iterator[Tensor]:
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    for group in length_sorted(items, MAX_TOKENS):
        batch = collate([items[i] for i in group]).to(device)
        yield model(batch.inputs, batch.index_N).float()
    model.train(was_training)


def _last_modules(model: Any, items: Sequence[Item]) -> tuple[Any, Any]:
    """Return the linear layer whose output the logits are, and the norm whose output it reads (None without one)."""
    seen: list[tuple[Any, Tensor, Tensor]] = []  # module, what it read, what it made

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((module, inputs[0], output))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or _is_norm(m)]
    hooks = [module.register_forward_hook(keep) for module in layers]
    batch = collate(items).to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        logits_NV = model(batch.inputs, batch.index_N)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    def same(a: Tensor, b: Tensor) -> bool:
        return a.dim() <= 3 and torch.equal(at_answers(a, batch, batch.index_N), at_answers(b, batch, batch.index_N))

    heads = [(m, read) for m, read, made in seen if isinstance(m, nn.Linear) and same(made, logits_NV)]
    if not heads:
        raise UserError(f"{type(model.lm).__name__}: its logits are no linear layer's output, so no weights scale them")
    head, read = heads[-1]
    norms = [m for m, _, made in seen if _is_norm(m) and same(made, read)]
    return head, norms[-1] if norms else None


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def open_kind(model: Any, folder: Path, device: torch.device) -> Any:
    """Return a checkpoint as another model of the same classes."""
    lm = type(model.lm).from_pretrained(folder, dtype=next(model.parameters()).dtype, use_safetensors=True)
    return type(model)(lm).to(device)
