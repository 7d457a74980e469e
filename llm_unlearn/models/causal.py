"""A causal LM that runs its vocabulary only where an answer token is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.errors import UserError
from llm_unlearn.models.image_model import ImageClassifier, ImageModel
from llm_unlearn.models.llama import has_plain_last_layer, states_at

CACHED_LOGITS, GPU_LOGITS = 1 << 19, 1 << 26  # 2 MB, 256 MB in fp32
MIN_ROWS = 16  # fewer would wait for the head to be read from memory


class AnswerModel(nn.Module):
    """Wraps any Hugging Face causal LM; what Accelerate prepares and every loss calls.

    A question-answer batch predicts a handful of its tokens, and for small models the vocabulary projection is most of
    the work, so hidden states are gathered at those positions first; in a plain Llama already before the last layer's
    queries and MLP. Models that do more than one projection after the last hidden state (soft-capped or scaled logits)
    are recognised by a probe and run in full.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        if getattr(lm.config, "is_encoder_decoder", False) or not _is_causal(lm):
            raise UserError(f"{type(lm).__name__} is no causal language model; choose a decoder-only one")
        self.lm = lm
        self.plain_head = _head_is_projection(lm)
        self.plain_last_layer = has_plain_last_layer(lm)

    def forward(self, input_ids_BT: Tensor, index_N: Tensor, layer: int | None = None) -> Tensor:
        """Return logits (N, V) at the flat positions `index_N`, or, with `layer`, that layer's output there (N, H).

        `layer` counts from 0; the output is the residual stream after that decoder layer, before any final norm.
        """
        if layer is not None:
            return self._layer_output(input_ids_BT, layer).flatten(0, 1)[index_N]
        if not self.plain_head:
            return self.lm(input_ids=input_ids_BT, use_cache=False).logits.flatten(0, 1)[index_N]
        return self.lm.get_output_embeddings()(self._states(input_ids_BT, index_N))

    def _layer_output(self, input_ids_BT: Tensor, layer: int) -> Tensor:
        decoder, kept = self.lm.get_decoder(), []
        blocks = decoder_layers(decoder)
        # transformers lists the last layer's output after the final norm, so that one is taken from the layer itself
        last = blocks[-1].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            states = decoder(input_ids=input_ids_BT, use_cache=False, output_hidden_states=True).hidden_states
        finally:
            last.remove()
        if layer < len(blocks) - 1:
            return states[layer + 1]
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]

    def states(self, input_ids_BT: Tensor, index_N: Tensor) -> Tensor:
        """Return what the output head reads at the flat positions (N, H); only for models with a plain head."""
        return self._states(input_ids_BT, index_N)

    # what `forward` calls: FSDP2 hooks `states` as an entrance of its own, and one entrance may not lie in another
    def _states(self, input_ids_BT: Tensor, index_N: Tensor) -> Tensor:
        if self.plain_last_layer:
            return states_at(self.lm, input_ids_BT, index_N)
        hidden_BTH = self.lm.get_decoder()(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_BTH.flatten(0, 1)[index_N]

    def logits_in_parts(self, input_ids_BT: Tensor, index_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which of the N positions, their logits) in order.

        Nothing of size N x V is held at once where the head is plain.
        """
        if not self.plain_head:
            yield slice(0, len(index_N)), self(input_ids_BT, index_N)
            return
        yield from self.head_in_parts(self.states(input_ids_BT, index_N))

    def hidden_size(self, layer: int) -> int:
        """Return H, the width of a layer's output: of every layer's the same."""
        return self.lm.config.hidden_size

    def head_in_parts(self, states_NH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which of N states, their logits) in order, a few rows at a time; only for models with a plain head.

        On CPU the rows' logits fit in a core's cache, which takes a quarter off the time of what is done to them.
        """
        head = self.lm.get_output_embeddings()
        limit = CACHED_LOGITS if states_NH.device.type == "cpu" else GPU_LOGITS
        # not the weight's own shape where there is another way: under ZeRO-3 it is empty between forward passes
        vocabulary = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        step = max(MIN_ROWS, limit // vocabulary)
        for begin in range(0, len(states_NH), step):
            part = slice(begin, min(begin + step, len(states_NH)))
            yield part, head(states_NH[part])


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """Return a model's decoder layers: of its lists of modules the largest, which holds the others."""
    lists = (m for m in lm.modules() if isinstance(m, nn.ModuleList))
    return max(lists, key=lambda found: sum(1 for _ in found.modules()))


def answer_model(lm: Any) -> Any:
    """Return the wrapper that losses and metrics call, of a language model or an image classifier."""
    return ImageModel(lm) if isinstance(lm, ImageClassifier) else AnswerModel(lm)


@torch.no_grad()
def _is_causal(lm: Any) -> bool:
    """Whether a token changes nothing before it. Configs do not say: `is_decoder` is False in every GPT-NeoX."""
    was_training = lm.training
    lm.eval()
    ids = torch.arange(4, device=next(lm.parameters()).device).unsqueeze(0) % lm.config.vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % lm.config.vocab_size
    a, b = (lm(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
    lm.train(was_training)
    return torch.allclose(a, b, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def _head_is_projection(lm: Any) -> bool:
    """Whether logits are the output head of the decoder's last hidden state and nothing else.

    Comparing values is not enough: a soft cap of 30 leaves the small logits of an untrained model as they are. So the
    head's output is replaced by a ramp far beyond any cap, which has to come out unchanged.
    """
    head = lm.get_output_embeddings()
    if head is None:
        return False
    seen: dict[str, Tensor] = {}

    def ramp(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = inputs[0]
        seen["output"] = torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output)
        return seen["output"]

    ids = torch.arange(4, device=next(lm.parameters()).device).unsqueeze(0) % lm.config.vocab_size
    was_training = lm.training
    lm.eval()
    hook = head.register_forward_hook(ramp)
    try:
        hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = lm(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        lm.train(was_training)
    if not seen or hidden.shape != seen["input"].shape:
        return False
    same_input = torch.allclose(hidden.float(), seen["input"].float(), atol=1e-4, rtol=1e-3)
    return same_input and torch.equal(logits.float(), seen["output"].float())


def position_limit(config: Any) -> tuple[int | None, bool]:
    """Return (tokens a model was made for, None if it does not say; whether its positions end there).

    Learned positions end; rotary ones go on, at lengths the model was not trained for.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_scaling", "rotary_dim"))
    return limit, limit is not None and not rotary
