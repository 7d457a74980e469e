"""Nets that classify small images: a CNN, residual nets, a vision transformer. Each is a stem, blocks and a neck, so
that "layer k" means one thing for all: block k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llm_unlearn.config import Config
from llm_unlearn.errors import UserError

Arch = Literal["cnn", "vit", "resnet8", "resnet14", "resnet18"]
Norm = Literal["none", "group", "batch"]
WIDTHS: dict[str, int] = {"cnn": 8, "vit": 64, "resnet8": 8, "resnet14": 8, "resnet18": 64}
STAGES: dict[str, tuple[int, ...]] = {"resnet8": (1, 1, 1), "resnet14": (2, 2, 2), "resnet18": (2, 2, 2, 2)}
VIT_LAYERS, VIT_HEADS = 2, 4
PATCHES = 7  # a side, at least, wherever patches of two pixels leave as many


class NetConfig(Config):
    """An image classifier trained from scratch.

    Weights are PyTorch's default initialisation, then every parameter times `alpha` (Liu et al. 2022, Omnigrok, arXiv
    2210.01117, section 2: alpha is the norm of all weights over that of the standard initialisation). That takes in
    the gains and offsets of norm layers, on purpose: what is before a norm does not depend on the scale of its
    weights, so under a norm the gains (and the head) are where alpha reaches the function at all.
    """

    arch: Arch = Field(default="cnn", description="Convolutional net, vision transformer, or residual net.")
    width: int | None = Field(
        default=None,
        ge=1,
        description="Channels of the first layer (cnn, resnet8, resnet14: 8, resnet18: 64), of every layer of a vit "
        "(64).",
    )
    layers: int | None = Field(default=None, ge=1, description="Layers of a vit (2); the others' are in their names.")
    heads: int | None = Field(default=None, ge=1, description="Attention heads of a vit (4); width must be a multiple.")
    norm: Norm = Field(
        default="none",
        description="After every convolution: nothing, group norm, or batch norm, under which the images of a training "
        "batch change each other's outputs. A vit has its layer norms.",
    )
    alpha: float = Field(
        default=1.0, gt=0, description="Scale of the initial weights; 1 is PyTorch's, large ones delay generalisation."
    )

    def resolved(self) -> dict[str, Any]:
        """Return arch, width, layers, heads and norm with defaults filled in; layers and heads are 0 where they mean
        nothing. Raises UserError for a combination that has no meaning.
        """
        width = self.width or WIDTHS[self.arch]
        if self.arch != "vit":
            for name in ("layers", "heads"):
                if getattr(self, name) is not None:
                    raise UserError(f"model.net.{name}: only a vit has it, and this is a {self.arch}; leave it out")
            return {"arch": self.arch, "width": width, "layers": 0, "heads": 0, "norm": self.norm}
        heads = self.heads or VIT_HEADS
        if self.norm != "none":
            raise UserError(f"model.net.norm={self.norm}: a vit has layer norms and no other; leave it out")
        if width % heads:
            raise UserError(f"model.net.width={width} is no multiple of model.net.heads={heads}; change one of them")
        return {"arch": "vit", "width": width, "layers": self.layers or VIT_LAYERS, "heads": heads, "norm": "none"}


@dataclass(frozen=True)
class Parts:
    """What a classifier is made of, the head aside: stem, blocks one after the other, neck, which gives (B, width)."""

    stem: nn.Module
    blocks: list[nn.Module]
    neck: nn.Module
    width: int


def block_widths(arch: str, width: int, layers: int) -> list[int]:
    """Return the channels each block puts out."""
    if arch == "cnn":
        return [width, 2 * width, 8 * width]
    if arch == "vit":
        return [width] * layers
    return [width * 2**stage for stage, n in enumerate(STAGES[arch]) for _ in range(n)]


def make_parts(arch: str, width: int, layers: int, heads: int, norm: str, shape: tuple[int, int, int]) -> Parts:
    """Return freshly initialised parts for images of `shape` (C, H, W); the arguments are those of
    `NetConfig.resolved`.
    """
    channels, height, wide = shape
    widths = block_widths(arch, width, layers)
    if arch == "cnn":
        # twice a convolution of stride 2 in place of pooling; 6,058 weights at width 8 on 8 x 8 digits of 10 classes
        size = math.ceil(height / 4) * math.ceil(wide / 4)
        blocks: list[nn.Module] = [
            nn.Sequential(_conv(channels, widths[0], 2, norm), nn.ReLU()),
            nn.Sequential(_conv(widths[0], widths[1], 2, norm), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(widths[1] * size, widths[2]), nn.ReLU()),
        ]
        return Parts(nn.Identity(), blocks, nn.Identity(), widths[-1])
    if arch == "vit":
        stem = Patches(channels, height, wide, width)
        return Parts(stem, [VitBlock(width, heads) for _ in widths], NormedMean(width), width)
    stem = nn.Sequential(_conv(channels, width, 1, norm), nn.ReLU())
    befores = [width, *widths[:-1]]
    blocks = [ResidualBlock(a, b, norm) for a, b in zip(befores, widths, strict=True)]
    return Parts(stem, blocks, SpaceMean(), widths[-1])


def pooled(x: Tensor) -> Tensor:
    """Return a block's output as (B, H): the mean over the places of (B, H, h, w) or the tokens of (B, T, H)."""
    if x.dim() == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.dim() == 3 else x


def patch_side(height: int, width: int) -> int:
    """Return the pixels a side of a vit's patches: the largest that divides both sides of the image and leaves at least
    7 patches along the shorter one, or up to 2 where the image is too small for that (8 x 8: 2; 14: 2; 28 and 32: 4;
    64: 8).
    """
    most = max(2, min(height, width) // PATCHES)
    return max(p for p in range(1, most + 1) if height % p == 0 and width % p == 0)


def _conv(before: int, after: int, stride: int, norm: str, kernel: int = 3) -> nn.Module:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2)
    if norm == "none":
        return conv
    # groups of four channels: the nets are too narrow for the usual 32 groups
    layer = nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(after // math.gcd(after, 4), after)
    return nn.Sequential(conv, layer)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385), which is a 1 x 1 convolution of
    stride 2 where the channels double (their option B), else the identity.
    """

    def __init__(self, before: int, after: int, norm: str) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.first = _conv(before, after, stride, norm)
        self.relu = nn.ReLU()
        self.second = _conv(after, after, 1, norm)
        self.shortcut = nn.Identity() if before == after else _conv(before, after, stride, norm, kernel=1)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, h, w), or half as high and wide."""
        return self.relu_out(self.shortcut(x) + self.second(self.relu(self.first(x))))


class SpaceMean(nn.Module):
    """Mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, h, w) -> (B, H)."""
        return x.mean((2, 3))


class NormedMean(nn.Module):
    """A vit's last layer norm, then the mean over its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, H)."""
        return self.norm(x).mean(1)


class Patches(nn.Module):
    """Square patches, one linear map of each, plus learned positions."""

    def __init__(self, channels: int, height: int, width: int, hidden: int) -> None:
        super().__init__()
        side = patch_side(height, width)
        self.project = nn.Conv2d(channels, hidden, side, side)
        self.positions = nn.Parameter(torch.empty(1, height // side * (width // side), hidden))
        nn.init.normal_(self.positions, std=0.02)  # PyTorch has no default for a bare parameter; this is the vit's own

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, H)."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class VitBlock(nn.Module):
    """A pre-norm transformer layer (Dosovitskiy et al. 2021, arXiv 2010.11929) with an MLP twice as wide: images this
    small need no more.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gelu, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        split = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, width of one)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.down(self.gelu(self.up(self.norm_mlp(x))))
