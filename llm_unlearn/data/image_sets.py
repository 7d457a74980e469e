"""Image data sets as corpora: which images are trained, which are the fixed test set, how pixels are prepared."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.data.image_colours import open_colours
from llm_unlearn.data.image_files import FASHION_FOLDER, HUB, ImageSource, Splits, open_hub, open_local, read_array
from llm_unlearn.data.images import RELATION, ImageRow
from llm_unlearn.data.schema import Corpus
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.seeding import derive, rng

ImageKind = Literal[
    "digits", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagenet100", "npz", "image_folder", "colours"
]
IMAGE_KINDS: tuple[str, ...] = get_args(ImageKind)
DIGITS_TEST = 790
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class ImageConfig(Config):
    """Which images of a data set are used, and how."""

    train: int | None = Field(
        default=400, ge=1, description="Training images, as many of each class, drawn by the seed; null: all."
    )
    test: int | None = Field(
        default=None,
        ge=1,
        description="Test images, as many of each class, the same for every seed; null: 790 of digits, else all test "
        "images there are. Data without a test set of their own need a number.",
    )
    val: int = Field(
        default=0,
        ge=0,
        description="Validation images, as many of each class, of the training images that are not used: checkpoints, "
        "settings and targets are then chosen by them, and the test images only measured. 0: the test images do both.",
    )
    size: int | None = Field(
        default=None,
        ge=2,
        description="Pool images down to size x size by area averaging (after cutting out the central square); null: "
        "as they are.",
    )
    gray: bool = Field(default=False, description="Turn colours into luminance.")
    coarse: bool = Field(
        default=False, description="CIFAR-100: the 20 super-classes are the classes, the 100 fine ones sub-classes."
    )
    clusters: int = Field(
        default=2,
        ge=1,
        le=20,
        description="Sub-classes of a class for data that name none: k-means on its training images; 1: none.",
    )
    normalise: Literal["unit", "standard"] = Field(
        default="unit",
        description="unit: 0..1 (digits /16, bytes /255); standard: mean 0, deviation 1 in each channel of the "
        "training images.",
    )


def image_corpus(kind: str, config: ImageConfig, path: str | None, seed: int) -> Corpus:
    """Return splits `train`, `test` and, if asked for, `val` of `ImageRow`s, in the order of the data set.

    A row's identity ("train/17") is the image's place in its data set, so it names the same image under every seed.
    `seed` draws the training images, and of those left over the validation images. Sub-classes are the data's own, or
    k-means clusters of the training images, the largest first; any other image belongs to the nearest centre.

    Raises UserError for an unknown kind, data that are not to be had or malformed, and too few images.
    """
    train, test = _open(kind, None if path is None else Path(path), config.coarse)
    n_test = DIGITS_TEST if config.test is None and kind == "digits" else config.test
    at_train, at_test, at_val = _draw(train, test, config.train, n_test, config.val, seed)
    parts = {"train": (train, at_train), "test": (test or train, at_test)}
    if len(at_val):
        parts["val"] = (train, at_val)
    pixels = [_pixels(source, at, config) for source, at in parts.values()]
    if pixels[0].shape[1:] != pixels[1].shape[1:]:
        raise UserError(
            f"{parts['test'][0].where}: test images are {_size(pixels[1])}, training images {_size(pixels[0])}; set "
            "image.size"
        )
    if config.normalise == "standard":
        pixels = _standard(train.where, pixels)
    labels = [source.labels_N[at] for source, at in parts.values()]
    own = [source.subs_N[at] for source, at in parts.values() if source.subs_N is not None]
    if len(own) == len(parts):
        subs, names = own, train.subclasses
    else:
        subs = _clusters(train, pixels, labels, config.clusters)
        names = tuple(map(str, range(config.clusters))) if config.clusters > 1 else ()
    splits = {
        name: _rows(name, at, x, [train.classes[y] for y in labels_N], [names[k] for k in subs_N] if names else [])
        for (name, (_, at)), x, labels_N, subs_N in zip(parts.items(), pixels, labels, subs, strict=True)
    }
    meta = {
        "config": {"kind": kind, **config.model_dump()},
        "seed": seed,
        "classes": list(train.classes),
        "shape": list(pixels[0].shape[1:]),
        "pixels": _digest(*pixels, *labels),
    }
    return Corpus(kind, "image", splits, meta)


def _open(kind: str, path: Path | None, coarse: bool) -> Splits:
    if kind not in IMAGE_KINDS:
        raise UserError(f"unknown image data '{kind}'{suggest(kind, IMAGE_KINDS)}")
    if kind in ("digits", "colours"):
        if path is not None or coarse:
            option = "data.path" if path is not None else "image.coarse"
            raise UserError(f"{kind} are built in and take no {option}; remove it, or name the kind of the files")
        return open_colours() if kind == "colours" else _digits()
    if path is None and kind == "fashion_mnist" and FASHION_FOLDER.is_dir() and not coarse:
        path = FASHION_FOLDER
    if path is not None:
        return open_local(kind, path, coarse)
    if kind not in HUB:
        raise UserError(f"{kind}: needs data.path, the file or folder that holds the images")
    return open_hub(kind, coarse=coarse)


def _digits() -> Splits:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = (data.images / 16).astype(np.float32)  # whole numbers 0..16: exact
    return ImageSource("digits", tuple("0123456789"), data.target.astype(np.int64), read_array(images)), None


def _draw(
    train: ImageSource, test: ImageSource | None, n_train: int | None, n_test: int | None, n_val: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of training, test and validation images, each in rising order; without `test` all are of
    `train`.
    """
    pool = np.arange(len(train.labels_N))
    if test is not None:
        at_test = np.arange(len(test.labels_N))
        at_test = at_test if n_test is None else _balanced(test, at_test, n_test, "image.test", 0)
    elif n_test is None:
        raise UserError(f"{train.where}: has no test images of its own; say how many to keep apart: image.test")
    else:
        if (n_train or 0) + n_test > len(pool):
            raise UserError(
                f"{train.where}: {n_train or 0} training + {n_test} test images of {len(pool)}; lower image.train or "
                "image.test"
            )
        at_test = _balanced(train, pool, n_test, "image.test", 0)
        pool = np.setdiff1d(pool, at_test)
    if n_train is None:
        for k in set(range(len(train.classes))) - set(train.labels_N[pool].tolist()):
            raise UserError(
                f"{train.where}: class '{train.classes[k]}' has no training image; take it out of the classes"
            )
    at_train = pool if n_train is None else _balanced(train, pool, n_train, "image.train", seed)
    at_val = _balanced(train, np.setdiff1d(pool, at_train), n_val, "image.val", seed) if n_val else pool[:0]
    return at_train, at_test, at_val


def _balanced(source: ImageSource, pool: np.ndarray, n: int, option: str, seed: int) -> np.ndarray:
    """Return `n` of the positions in `pool`, as many of each class; what is left over goes to classes drawn at random.

    One stream a class, so a larger `n` under the same seed adds images and keeps those it had.
    """
    each, more = divmod(n, len(source.classes))
    if each == 0:
        raise UserError(f"{option}={n}: {source.where} has {len(source.classes)} classes; each needs an image")
    extra = set(rng(seed, "images", option, "extra").permutation(len(source.classes))[:more].tolist())
    chosen = []
    for k, name in enumerate(source.classes):
        members, wanted = pool[source.labels_N[pool] == k], each + (k in extra)
        if len(members) < wanted:
            raise UserError(
                f"{source.where}: class '{name}' has {len(members)} images to draw from, {option}={n} needs {wanted}; "
                f"lower {option}"
            )
        chosen.append(rng(seed, "images", option, k).permutation(members)[:wanted])
    return np.sort(np.concatenate(chosen))


def _pixels(source: ImageSource, at: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Return the images at `at`, (N, C, H, W) float32 in 0..1."""
    out: np.ndarray | None = None
    for row, (i, image) in enumerate(zip(at, source.read(at.tolist()), strict=True)):
        pixels = _prepared(image, config, f"{source.where}: image {i}")
        if out is None:
            out = np.empty((len(at), *pixels.shape), np.float32)
        if pixels.shape != out.shape[1:]:
            raise UserError(
                f"{source.where}: image {i} is {_size(pixels[None])}, image {at[0]} {_size(out)}; all must be equal: "
                "set image.size to crop and pool them"
            )
        out[row] = pixels
    assert out is not None  # a source is never empty, nor a draw from it
    return out


def _prepared(image: np.ndarray, config: ImageConfig, where: str) -> np.ndarray:
    """Return one image as (C, H, W) float32 in 0..1, cropped and pooled."""
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"{where} has shape {image.shape}; needed are (H, W), (H, W, 1) or (H, W, 3)")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / np.float32(255)
    elif pixels.dtype.kind != "f":
        raise UserError(f"{where} is {pixels.dtype}; needed are uint8, or floats from 0 to 1")
    elif not np.isfinite(pixels).all():
        raise UserError(f"{where} has pixels that are NaN or infinite; mend or remove it")
    elif pixels.min() < 0 or pixels.max() > 1:
        raise UserError(f"{where} has pixels from {pixels.min():g} to {pixels.max():g}; floats must be from 0 to 1")
    if config.gray and pixels.shape[2] == 3:
        pixels = (pixels @ LUMINANCE)[..., None]
    pixels = np.moveaxis(pixels, 2, 0)
    if config.size is not None:
        side = min(pixels.shape[1:])
        if config.size > side:
            raise UserError(f"{where} is {_size(pixels[None])}, smaller than image.size={config.size}; lower it")
        top, left = ((n - side) // 2 for n in pixels.shape[1:])
        average = _averaging(side, config.size)
        pixels = average @ pixels[:, top : top + side, left : left + side] @ average.T
    return pixels.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _averaging(n: int, size: int) -> np.ndarray:
    """Return the (size, n) matrix whose rows average n pixels over `size` equal stretches, parts of pixels included."""
    edges = np.arange(size + 1) * (n / size)
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(n)
    return np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None) * (size / n)


def _standard(where: str, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Scale all splits as the first one, the training images, asks."""
    train = pixels[0]
    mean = train.mean((0, 2, 3), dtype=np.float64, keepdims=True)
    deviation = train.std((0, 2, 3), dtype=np.float64, keepdims=True)
    if not (deviation > 0).all():
        raise UserError(f"{where}: a channel is the same in all training images; use image.normalise=unit")
    return [((x - mean) / deviation).astype(np.float32) for x in pixels]


def _clusters(
    source: ImageSource, pixels: Sequence[np.ndarray], labels: Sequence[np.ndarray], k: int
) -> list[np.ndarray]:
    """Return a cluster number for every image of every split, by k-means within a class of the first, the trained."""
    out = [np.zeros_like(labels_N) for labels_N in labels]
    if k == 1:
        return out
    from sklearn.cluster import KMeans

    for label, name in enumerate(source.classes):
        mine = [y == label for y in labels]
        flat = [x[at].reshape(at.sum(), -1).astype(np.float64) for x, at in zip(pixels, mine, strict=True)]
        if len(np.unique(flat[0], axis=0)) < k:
            raise UserError(
                f"{source.where}: class '{name}' has fewer than {k} different training images; lower image.clusters or "
                "raise image.train"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads and memory, on some platforms
            options: dict[str, Any] = {"n_init": 10, "random_state": derive(0, "clusters", label) % 2**32}
            found: Any = KMeans(k, **options).fit(flat[0])
        by_size = np.argsort(-np.bincount(found.labels_, minlength=k), kind="stable")
        rank = np.empty(k, np.int64)
        rank[by_size] = np.arange(k)
        out[0][mine[0]] = rank[found.labels_]
        for sub_N, at, others in zip(out[1:], mine[1:], flat[1:], strict=True):
            if len(others):
                sub_N[at] = rank[found.predict(others)]
    return out


def _rows(split: str, at: np.ndarray, pixels: np.ndarray, names: list[str], subs: list[str]) -> tuple[ImageRow, ...]:
    rows = []
    for i, (position, name) in enumerate(zip(at.tolist(), names, strict=True)):
        identity = f"{split}/{position}"
        facts = (identity, f"class:{name}", *([f"subclass:{name}.{subs[i]}"] if subs else []))
        rows.append(
            ImageRow(
                identity, name, author=identity, relation=RELATION, fact_id=identity, facts=facts, pixels=pixels[i]
            )
        )
    return tuple(rows)


def _digest(*arrays: np.ndarray) -> str:
    """Return the sha256 of arrays, their shapes included, the same on machines of either byte order."""
    whole = hashlib.sha256()
    for array in arrays:
        plain = np.ascontiguousarray(array, dtype="<f4" if array.dtype.kind == "f" else "<i8")
        whole.update(repr(plain.shape).encode())
        whole.update(plain.reshape(-1).data)
    return whole.hexdigest()


def _size(pixels: np.ndarray) -> str:
    return "x".join(map(str, (*pixels.shape[2:], pixels.shape[1])))
