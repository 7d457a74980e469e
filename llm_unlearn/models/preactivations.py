"""What goes into a model's activation functions, at its inputs and in their neighbourhood; for texts and images alike.

A neighbourhood is taken in the space where inputs are real numbers: the pixels of an image, or the (T, d) token
embeddings of a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.errors import UserError

_ACTIVATION = re.compile(r"relu|gelu|silu|swish|mish|softplus", re.IGNORECASE)


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that apply a rectifier-like function (ReLU, GELU, SiLU ...), by name, in order of definition.

    Known by the name of their class, so that transformers' own are found. Raises UserError for a model without any:
    `torch.relu` called as a function cannot be seen from outside.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if _ACTIVATION.search(type(module).__name__) and not any(True for _ in module.children())
    }
    if not found:
        raise UserError(
            f"{type(getattr(model, 'lm', model)).__name__}: has no activation modules (nn.ReLU, nn.GELU, nn.SiLU ...), "
            "so it has no pre-activations to look at; use modules in place of functions"
        )
    return found


def orthonormal(shape: tuple[int, ...], n_directions: int, seed: int) -> Tensor:
    """Return random orthonormal directions: (P, *shape) float64, P = n_directions or, if less, the dimension.

    The same for one (shape, n_directions, seed) on every machine up to rounding: drawn on the CPU.
    """
    n = torch.Size(shape).numel()
    drawn = torch.randn(n, min(n_directions, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, corner = torch.linalg.qr(drawn)
    return (basis * corner.diagonal().sign()).T.reshape(-1, *shape)


def neighbourhood_shape(model: Any, inputs: Tensor) -> tuple[int, ...]:
    """Return the shape of one input where it is real numbers: (C, H, W) of an image, (T, d) of a text's embeddings."""
    if inputs.is_floating_point():
        return tuple(inputs.shape[1:])
    return inputs.shape[1], model.lm.get_input_embeddings().embedding_dim


def points(model: Any, inputs: Tensor) -> Tensor:
    """Return the inputs where they are real numbers: the (B, C, H, W) images, or (B, T, d) token embeddings."""
    return inputs if inputs.is_floating_point() else model.lm.get_input_embeddings()(inputs)


def preactivations(model: Any, inputs: Tensor, index_N: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
    """Run a model and return what went into every activation function: name -> (B or N, neurons), in calling order.

    Args:
        model: AnswerModel or its counterpart for images.
        inputs: (B, T) token ids or (B, C, H, W) images.
        index_N: (N,) flat answer positions. Of a text only these are returned, N rows; an image has B rows, its
            channels and places laid end to end.
        shift: (C, H, W) or (T, d), added to every image or to every text's token embeddings.

    Raises UserError for a model without activation modules.
    """
    seen: dict[str, Tensor] = {}
    image = inputs.is_floating_point()

    def reader(name: str):
        def read(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            z = arguments[0]
            if not image:
                # the last layer may run at the answer positions alone
                z = z.flatten(0, 1)[index_N] if z.dim() == 3 else z
            call = sum(key == name or key.startswith(f"{name}#") for key in seen) + 1
            seen[name if call == 1 else f"{name}#{call}"] = z.flatten(1)

        return read

    hooks = [m.register_forward_pre_hook(reader(name)) for name, m in activation_modules(model).items()]
    try:
        with _shifted(model, None if image else shift):
            model(inputs + shift if image and shift is not None else inputs, index_N)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def vertices(
    model: Any, inputs: Tensor, index_N: Tensor, directions: Tensor, radius: float
) -> Iterator[dict[str, Tensor]]:
    """Yield the pre-activations at every vertex x + r u_1, x - r u_1, x + r u_2 ... of the inputs' neighbourhoods.

    Args:
        directions: (P, ...) orthonormal, shared by all inputs.
        radius: r, Euclidean length.
    """
    dtype = next(model.parameters()).dtype
    for direction in directions:
        for sign in (radius, -radius):
            yield preactivations(model, inputs, index_N, (sign * direction).to(inputs.device, dtype))


@contextmanager
def _shifted(model: Any, shift: Tensor | None) -> Iterator[None]:
    if shift is None:
        yield
        return
    hook = model.lm.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + shift)
    try:
        yield
    finally:
        hook.remove()
