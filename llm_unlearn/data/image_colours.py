"""A small colour data set made in memory: shapes whose colour is the class and whose form is the sub-class."""

from __future__ import annotations

import colorsys

import numpy as np

from llm_unlearn.data.image_files import ImageSource, Splits, read_array
from llm_unlearn.seeding import rng

COLOURS = ("red", "orange", "yellow", "lime", "green", "cyan", "azure", "blue", "violet", "magenta")
SHAPES = ("disc", "square", "cross", "triangle")
SIZE = 32
PER_CLASS = {"train": 200, "test": 80}
HUE_STEPS = 1000  # of the circle; neighbouring classes are 100 apart
HUE_JITTER = 45
NOISE = 40


def open_colours() -> Splits:
    """Return 2,000 training and 800 test images of 32x32, 10 colours of 4 shapes each, always the same ones.

    Whole numbers throughout, so that every machine makes the same bytes.
    """
    return _split("train"), _split("test")


def _split(name: str) -> ImageSource:
    n = PER_CLASS[name] * len(COLOURS)
    labels_N, shapes_N = np.arange(n) % len(COLOURS), np.arange(n) // len(COLOURS) % len(SHAPES)
    draw = rng(0, "colours", name)
    images = draw.integers(20, 120, (n, 1, 1, 1)) + draw.integers(-NOISE, NOISE + 1, (n, SIZE, SIZE, 3))
    hue_N = labels_N * (HUE_STEPS // len(COLOURS)) + draw.integers(-HUE_JITTER, HUE_JITTER + 1, n)
    light_N, radius_N = draw.integers(140, 256, n), draw.integers(6, 11, n)
    centre_N2 = draw.integers(radius_N[:, None], SIZE - radius_N[:, None], (n, 2))
    for i in range(n):
        inside = _form(SHAPES[shapes_N[i]], int(radius_N[i]), *map(int, centre_N2[i]))
        paint = colorsys.hsv_to_rgb(hue_N[i] % HUE_STEPS / HUE_STEPS, 0.75, float(light_N[i]))
        images[i][inside] += np.array([int(part) for part in paint]) - 70
    pixels = np.clip(images, 0, 255).astype(np.uint8)
    return ImageSource(
        "colours", COLOURS, labels_N.astype(np.int64), read_array(pixels), SHAPES, shapes_N.astype(np.int64)
    )


def _form(shape: str, radius: int, row: int, column: int) -> np.ndarray:
    y, x = np.ogrid[-row : SIZE - row, -column : SIZE - column]
    box = (abs(x) <= radius) & (abs(y) <= radius)
    return (
        box
        & {
            "disc": x * x + y * y <= radius * radius,
            "square": box,
            "cross": (abs(x) <= radius // 3) | (abs(y) <= radius // 3),
            "triangle": 2 * abs(x) <= y + radius,
        }[shape]
    )
