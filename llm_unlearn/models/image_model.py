"""Image classifiers as Hugging Face models, and the wrapper by which losses and metrics call them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from llm_unlearn.errors import UserError
from llm_unlearn.models.image_nets import NetConfig, block_widths, make_parts, pooled

MODEL_TYPE = "llm_unlearn_image"


class ImageConfig(PretrainedConfig):
    """Shape of an ImageClassifier, as its config.json holds it. `layers` and `heads` are a vit's, else 0."""

    model_type = MODEL_TYPE

    arch: str = "cnn"
    width: int = 8
    layers: int = 0
    heads: int = 0
    norm: str = "none"
    image_shape: list[int] | tuple[int, ...] = (1, 8, 8)

    @property
    def hidden_sizes(self) -> list[int]:
        """Width of each block's output."""
        return block_widths(self.arch, self.width, self.layers)

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks."""
        return len(self.hidden_sizes)


class ImageClassifier(PreTrainedModel):
    """Images to class logits: a stem, blocks (the "layers"), a neck and `head`, a Linear.

    An image's outputs depend on it alone, with one exception: in training mode, batch norm mixes the images of a
    batch, so that training depends on which images meet (micro-batches and processes included) and moves the running
    statistics, which are buffers, saved and restored with the weights. Scores are taken in eval mode, where they are
    fixed numbers.
    """

    config_class = ImageConfig
    main_input_name = "pixels_BCHW"
    supports_lora = False  # too small to gain by adapters
    _input_embed_layer = "stem"

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        channels, height, width = config.image_shape
        parts = make_parts(
            config.arch, config.width, config.layers, config.heads, config.norm, (channels, height, width)
        )
        self.stem, self.blocks, self.neck = parts.stem, nn.ModuleList(parts.blocks), parts.neck
        self.head = nn.Linear(parts.width, config.num_labels)  # pyright: ignore[reportArgumentType]
        self._macs: int | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave PyTorch's default initialisation as it is."""

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head: one row of weights a class."""
        return self.head

    @property
    def n_layers(self) -> int:
        """How many blocks."""
        return len(self.blocks)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return logits (B, n_classes). Raises UserError for images of another shape than the model's."""
        return self.head(self.neck(self._run(pixels_BCHW, self.n_layers)))

    def features(self, pixels_BCHW: Tensor, layer: int) -> Tensor:
        """Return the output of block `layer`, counted from 0, mean over space or tokens: (B, H).

        Raises UserError for a layer the model does not have.
        """
        if not 0 <= layer < self.n_layers:
            raise UserError(f"layer={layer}: the model has {self.n_layers} layers; choose 0 to {self.n_layers - 1}")
        return pooled(self._run(pixels_BCHW, layer + 1))

    def preactivations(self, pixels_BCHW: Tensor) -> list[tuple[str, Tensor]]:
        """Return (name of the module, what it is given) for every ReLU or GELU, in the order of computation; gradients
        flow. The units' hyperplanes are where these are zero, which is what local complexity counts.
        """
        found: list[tuple[str, Tensor]] = []

        def keep(name: str) -> Any:
            return lambda _module, inputs: found.append((name, inputs[0]))

        hooks = [
            module.register_forward_pre_hook(keep(name))
            for name, module in self.named_modules()
            if isinstance(module, (nn.ReLU, nn.GELU))
        ]
        try:
            self._run(pixels_BCHW, self.n_layers)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def macs_per_image(self) -> int:
        """Return the multiplications of one image's forward pass that are added up (convolutions, linear layers, the
        head, attention), measured once; norms, activations, biases and means are not counted.
        """
        if self._macs is None:
            was_training = self.training
            self.eval()
            zero = torch.zeros(1, *self.config.image_shape, device=self.device)
            # plain attention: the counter does not know the CPU's fused one
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self(zero)
            self.train(was_training)
            self._macs = counter.get_total_flops() // 2
        return self._macs

    def _run(self, pixels_BCHW: Tensor, n_blocks: int) -> Tensor:
        if list(pixels_BCHW.shape[1:]) != list(self.config.image_shape):
            theirs, mine = ("x".join(map(str, shape)) for shape in (pixels_BCHW.shape[1:], self.config.image_shape))
            raise UserError(f"the images are {theirs}, and the model was made for {mine}; give it its own data")
        x = self.stem(pixels_BCHW.to(self.head.weight.dtype))
        for block in self.blocks[:n_blocks]:
            x = block(x)
        return x


class ImageModel(nn.Module):
    """Wraps an ImageClassifier as AnswerModel does a language model: an image predicts one token, its class."""

    plain_head = False  # classes are few: logits are never worth computing in parts

    def __init__(self, lm: ImageClassifier) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, inputs_BCHW: Tensor, index_N: Tensor, layer: int | None = None) -> Tensor:
        """Return logits (N, n_classes) of the images numbered `index_N`, or, with `layer`, that block's output for
        them, mean over space or tokens (N, H).
        """
        return (self.lm(inputs_BCHW) if layer is None else self.lm.features(inputs_BCHW, layer))[index_N]

    def logits_in_parts(self, inputs_BCHW: Tensor, index_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which of the N images, their logits): all at once."""
        yield slice(0, len(index_N)), self(inputs_BCHW, index_N)

    def hidden_size(self, layer: int) -> int:
        """Return H, the width of a layer's output."""
        return self.lm.config.hidden_sizes[layer]


def build_classifier(config: NetConfig, shape: Sequence[int], n_classes: int, seed: int) -> ImageClassifier:
    """Return a classifier of (C, H, W) images with seeded random weights, `config.alpha` times PyTorch's default.

    Raises UserError for an impossible shape.
    """
    if len(shape) != 3 or min(shape) < 1 or n_classes < 2:
        raise UserError(f"images of shape {tuple(shape)} in {n_classes} classes: need (C, H, W) and at least 2 classes")
    torch.manual_seed(seed)
    known = ImageConfig(
        **config.resolved(),
        image_shape=list(shape),
        num_labels=n_classes,  # pyright: ignore[reportCallIssue]  # taken through **kwargs
    )
    lm = ImageClassifier(known)
    if config.alpha != 1:
        with torch.no_grad():
            for weight in lm.parameters():
                weight.mul_(config.alpha)
    return lm


def check_classes(lm: ImageClassifier, classes: Sized, name: str) -> None:
    """Refuse classes of another number than the model tells apart."""
    if len(classes) != lm.head.out_features:
        raise UserError(
            f"{name}: the model tells {lm.head.out_features} classes apart, the data has {len(classes)}; use the data "
            "it was trained on"
        )
