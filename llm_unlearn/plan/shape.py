"""What a model's memory and operations depend on, read off a model that may hold no weights at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_unlearn.models.causal import decoder_layers
from llm_unlearn.models.llama import has_plain_last_layer

QUERY_SIDE = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEY_SIDE = ("k_proj", "v_proj")
OTHER_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "logits_soft_cap")  # more than a projection


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder in numbers. Counts are of elements; `*_bytes` are bytes per element.

    Attributes:
        hidden, ff, layers, heads, vocab: width of the residual stream, of the MLP, decoder layers, attention heads,
            output rows.
        q_width, kv_width: columns of the queries and of the keys (or values) of a layer, all heads together.
        parameters, trainable: of the whole model, adapters included.
        layer_parameters, layer_trainable: of one decoder layer.
        head_parameters: of the output projection; it may be the input embedding, see `tied`.
        weight_bytes: bytes of a weight; gradients and AdamW's moments have the same type.
        autocast_bytes: bytes of what matrix products read under autocast, None without it.
        adapted, rank: names of a layer's projections that have a LoRA adapter, and its rank.
        largest: elements of the largest tensor that is trained.
        base_trains: whether the weights themselves are trained.
        eager: whether attention keeps its matrix of weights (rows x heads x width x width).
        checkpointing: whether a layer keeps its input only and is computed again in the backward pass.
        last_at_answers: whether the last layer's queries and MLP run at answer positions only (models.llama).
        head_at_answers: whether the output projection does (models.causal).
        llama_style: whether it has the gated MLP the formulas are for.
    """

    hidden: int
    ff: int
    layers: int
    heads: int
    vocab: int
    q_width: int
    kv_width: int
    parameters: int
    trainable: int
    layer_parameters: int
    layer_trainable: int
    head_parameters: int
    tied: bool
    weight_bytes: int = 4
    autocast_bytes: int | None = None
    adapted: frozenset[str] = frozenset()
    rank: int = 0
    base_trains: bool = True
    largest: int = 0
    eager: bool = False
    checkpointing: bool = False
    last_at_answers: bool = True
    head_at_answers: bool = True
    llama_style: bool = True

    @property
    def product_bytes(self) -> int:
        """Bytes of an element that a matrix product reads and writes."""
        return self.autocast_bytes or self.weight_bytes

    @property
    def other_parameters(self) -> int:
        """Embeddings, final norm and output projection: what is in no decoder layer."""
        return self.parameters - self.layers * self.layer_parameters

    @property
    def other_trainable(self) -> int:
        """How many of those are trained."""
        return self.trainable - self.layers * self.layer_trainable

    @property
    def layer_products(self) -> dict[str, int]:
        """Weights of each projection of a layer; a token costs two operations per weight."""
        h, f = self.hidden, self.ff
        return {
            "q_proj": h * self.q_width, "k_proj": h * self.kv_width, "v_proj": h * self.kv_width,
            "o_proj": self.q_width * h, "gate_proj": h * f, "up_proj": h * f, "down_proj": f * h,
        }  # fmt: skip


def read_shape(lm: Any, precision: str = "no") -> Shape:
    """Return the shape of a Hugging Face causal LM (meta tensors will do), with or without LoRA adapters, as it is
    trained under `loop.precision`.
    """
    config = lm.config
    layers = decoder_layers(lm)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    names = {name.rsplit(".", 1)[-1] for name, _ in layers[0].named_modules()}
    ranks = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]: p.shape[0]
        for name, p in layers[0].named_parameters()
        if ".lora_A." in name
    }
    head = lm.get_output_embeddings().weight
    base = [p for name, p in lm.named_parameters() if "lora_" not in name]
    return Shape(
        hidden=config.hidden_size,
        ff=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=len(layers),
        heads=heads,
        vocab=head.shape[0],
        q_width=heads * head_dim,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        parameters=_count(lm),
        trainable=_count(lm, trained=True),
        layer_parameters=_count(layers[0]),
        layer_trainable=_count(layers[0], trained=True),
        head_parameters=head.numel(),
        tied=head is lm.get_input_embeddings().weight,
        weight_bytes=base[0].element_size(),
        autocast_bytes=None if precision == "no" else 2,
        adapted=frozenset(ranks),
        rank=max(ranks.values(), default=0),
        largest=max((p.numel() for p in lm.parameters() if p.requires_grad), default=0),
        base_trains=any(p.requires_grad for p in base),
        eager=config._attn_implementation == "eager",
        checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in lm.modules()),
        last_at_answers=has_plain_last_layer(lm),
        head_at_answers=all(getattr(config, name, None) in (None, 1, 1.0) for name in OTHER_LOGITS),
        llama_style={*QUERY_SIDE, *KEY_SIDE} <= names,
    )


def _count(module: nn.Module, *, trained: bool = False) -> int:
    seen: dict[int, torch.Tensor] = {id(p): p for p in module.parameters() if p.requires_grad or not trained}
    return sum(p.numel() for p in seen.values())
