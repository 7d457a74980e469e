"""Images as they lie about: npz, idx, folders of pictures, tables of the hub.

Labels are read at once, pixels on demand. Pickle archives (the original CIFAR files) are never read: unpickling runs
whatever code a file holds.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.data.hub import hub_table
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.files import open_file

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
NO_PICKLE = (
    "pickle and MATLAB archives are never read: convert to npz with np.savez(file, images=, labels=, classes=), images "
    "uint8 (N, H, W, C)"
)


@dataclass(frozen=True)
class ImageSource:
    """The images of one split before any is read."""

    where: str
    """What messages start with: a path, a repository or the kind."""
    classes: tuple[str, ...]
    labels_N: np.ndarray
    """(N,) int64 into `classes`."""
    read: Callable[[Iterable[int]], Iterator[np.ndarray]]
    """Positions -> images (H, W) or (H, W, C), uint8 or float in 0..1, in the order asked for."""
    subclasses: tuple[str, ...] = ()
    subs_N: np.ndarray | None = None
    """(N,) int64 into `subclasses`; None: the data have no sub-classes of their own."""

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes) or not all(map(str.strip, self.classes)):
            raise UserError(f"{self.where}: class names must be there, different and not empty; mend 'classes'")
        if len(self.labels_N) == 0:
            raise UserError(f"{self.where}: no images; is it the right file?")
        bad = np.flatnonzero((self.labels_N < 0) | (self.labels_N >= len(self.classes)))
        if len(bad):
            raise UserError(
                f"{self.where}: label {self.labels_N[bad[0]]} of image {bad[0]} is out of range ({len(self.classes)} "
                "classes, numbered from 0); mend the labels"
            )


Splits = tuple[ImageSource, ImageSource | None]
"""Training images, and test images if the data keep them apart."""


def read_array(images: Any) -> Callable[[Iterable[int]], Iterator[np.ndarray]]:
    """Return a reader of images that are in memory, (N, H, W) or (N, H, W, C)."""
    return lambda at: (images[i] for i in at)


# --- npz


def open_npz(path: Path, coarse: bool = False) -> Splits:
    """Read `images`, `labels`, `classes` of one file (with `test_images`, `test_labels` if it has them), or of
    `train.npz` and, if it is there, `test.npz` of a folder.

    With `coarse`, `coarse_labels` and `coarse_classes` are the classes, and the others their sub-classes.
    """
    file = path / "train.npz" if path.is_dir() else path
    arrays = _npz_arrays(file)
    train = _npz_split(file, arrays, "", coarse)
    if "test_images" in arrays:
        return train, _npz_split(file, arrays, "test_", coarse)
    if not path.is_dir() or not (path / "test.npz").exists():
        return train, None
    test = _npz_split(path / "test.npz", _npz_arrays(path / "test.npz"), "", coarse)
    if (test.classes, test.subclasses) != (train.classes, train.subclasses):
        raise UserError(f"{test.where}: names other classes than {train.where}; both need the same, in the same order")
    return train, test


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    known = ("images", "labels", "classes", "coarse_labels", "coarse_classes")
    known += ("test_images", "test_labels", "test_coarse_labels")
    try:
        with open_file(path) as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: is one array, no npz archive; write it with np.savez")
            return {name: archive[name] for name in archive.files if name in known}
    except ValueError as error:  # numpy's kind for pickles, object arrays and bad headers
        why = (
            f"holds pickled objects; {NO_PICKLE}"
            if "pickle" in str(error)
            else "is no npz archive, or damaged; write it anew"
        )
        raise UserError(f"{path}: {why}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, MemoryError):
        raise UserError(f"{path}: is no whole npz archive; copy or write it again") from None


def _npz_split(path: Path, arrays: dict[str, np.ndarray], prefix: str, coarse: bool) -> ImageSource:
    needed = [f"{prefix}images", f"{prefix}labels", "classes"]
    needed += [f"{prefix}coarse_labels", "coarse_classes"] if coarse else []
    for name in needed:
        if name not in arrays:
            hint = "; image.coarse needs it" if "coarse" in name else ""
            has = ", ".join(arrays) or "nothing known"
            raise UserError(f"{path}: no array '{name}' (has: {has}){hint}; write it with np.savez")
    images = arrays[f"{prefix}images"]
    if images.ndim not in (3, 4):
        raise UserError(f"{path}: '{prefix}images' must be (N, H, W) or (N, H, W, C), got {images.shape}")
    labels = _npz_labels(path, arrays, f"{prefix}labels", len(images))
    read, names = read_array(images), _npz_names(path, arrays, "classes")
    if not coarse:
        return ImageSource(str(path), names, labels, read)
    above = _npz_labels(path, arrays, f"{prefix}coarse_labels", len(images))
    ImageSource(str(path), names, labels, read)  # the sub-classes are labels too: the same checks
    return ImageSource(str(path), _npz_names(path, arrays, "coarse_classes"), above, read, names, labels)


def _npz_labels(path: Path, arrays: dict[str, np.ndarray], name: str, n: int) -> np.ndarray:
    labels = arrays[name]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != n:
        raise UserError(
            f"{path}: '{name}' must be {n} whole numbers, one an image, got {labels.dtype} {labels.shape}; mend it"
        )
    return labels.astype(np.int64)


def _npz_names(path: Path, arrays: dict[str, np.ndarray], name: str) -> tuple[str, ...]:
    names = arrays[name]
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{path}: '{name}' must be a list of texts, got {names.dtype} {names.shape}; mend it")
    return tuple(str(text) for text in names)


# --- idx


def open_idx(folder: Path) -> Splits:
    """Read the four idx files of Fashion-MNIST, plain or .gz (format: yann.lecun.com/exdb/mnist)."""
    return _idx_split(folder, "train"), _idx_split(folder, "t10k")


def _idx_split(folder: Path, prefix: str) -> ImageSource:
    path, beside = (_idx_path(folder, f"{prefix}-{rest}-ubyte") for rest in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(path, ndim=3), read_idx(beside, ndim=1)
    if len(images) != len(labels):
        raise UserError(f"{beside}: {len(labels)} labels for the {len(images)} images of {path.name}; copy both again")
    return ImageSource(str(path), FASHION_CLASSES, labels.astype(np.int64), read_array(images))


def _idx_path(folder: Path, name: str) -> Path:
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
    if not found:
        raise UserError(f"{folder}: no {name} nor {name}.gz; all four files of Fashion-MNIST are needed")
    return found[0]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return an idx file of `ndim` dimensions as uint8; UserError when it is another kind of file or cut off."""
    with open_file(path) as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path}: is no whole gzip file; copy it again") from None
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim  # 8: unsigned bytes
    if data[:4] != magic:
        raise UserError(
            f"{path}: begins with {data[:4].hex() or 'nothing'}, an idx file of bytes in {ndim} dimensions with "
            f"{magic.hex()}; is it the right file?"
        )
    shape = tuple(int(n) for n in np.frombuffer(data[4:start].ljust(4 * ndim, b"\xff"), ">u4"))
    if len(data) - start != math.prod(shape):
        raise UserError(f"{path}: holds {len(data) - start:,} bytes, its header promises {shape}; copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# --- folders of pictures


def open_folder(path: Path) -> Splits:
    """Read `train/<class>/<picture>` and `test/` (`val/`, `validation/`), or `<class>/<picture>` with no test set."""
    if not (path / "train").is_dir():
        return _folder_split(path, None), None
    train = _folder_split(path / "train", None)
    found = [path / name for name in ("test", "val", "validation") if (path / name).is_dir()]
    return train, _folder_split(found[0], train.classes) if found else None


def _folder_split(folder: Path, known: tuple[str, ...] | None) -> ImageSource:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = tuple(names) if known is None else known
    for name in names:
        if name not in classes:
            raise UserError(f"{folder / name}: unknown class, no training picture has it{suggest(name, classes)}")
    files: list[Path] = []
    labels: list[int] = []
    for name in names:
        inside = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not inside:
            raise UserError(f"{folder / name}: no pictures ({', '.join(sorted(SUFFIXES))}); fill or remove the folder")
        files += inside
        labels += [classes.index(name)] * len(inside)
    if not files:
        raise UserError(f"{folder}: no <class>/<picture> in it; {NO_PICKLE}")
    return ImageSource(str(folder), classes, np.array(labels, np.int64), lambda at: (_picture(files[i]) for i in at))


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    with open_file(path) as file:
        try:
            with Image.open(file) as picture:
                return rgb(picture, "RGB", str(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"{path}: no picture that can be read ({why}); replace or remove it") from None


def rgb(picture: Any, mode: str, where: str) -> np.ndarray:
    """Return a PIL picture as uint8, (H, W, 3), or (H, W) with mode L. 16 bits a pixel are refused, not clipped."""
    if picture.mode[0] in "IF":
        raise UserError(
            f"{where}: has more than 8 bits a pixel (mode {picture.mode}); convert it, or give floats as npz"
        )
    return np.asarray(picture.convert(mode))


# --- the hub


@dataclass(frozen=True)
class HubSet:
    """Where a data set is on the hub, and what its columns are called."""

    title: str
    repository: str
    config: str
    image: str = "image"
    label: str = "label"
    coarse: str = ""
    test: str = "test"
    mode: str = "RGB"
    advice: str = "data.path=FOLDER (train.npz and test.npz, train/<class>/<picture>, or a copy of the repository)"


HUB = {
    "fashion_mnist": HubSet(
        "Fashion-MNIST", "zalando-datasets/fashion_mnist", "fashion_mnist", mode="L",
        advice=f"data.path=FOLDER of the four idx files (Debian: package dataset-fashion-mnist, into {FASHION_FOLDER})",
    ),
    "cifar10": HubSet("CIFAR-10", "uoft-cs/cifar10", "plain_text", image="img"),
    "cifar100": HubSet("CIFAR-100", "uoft-cs/cifar100", "cifar100", "img", "fine_label", "coarse_label"),
    "svhn": HubSet("SVHN", "ufldl-stanford/svhn", "cropped_digits"),
    "imagenet100": HubSet("ImageNet-100", "clane9/imagenet-100", "default", test="validation"),
}  # fmt: skip


def open_hub(kind: str, copy: Path | None = None, coarse: bool = False) -> Splits:
    """Read a table of the hub, its cache, or a local copy of the repository; pictures are decoded when asked for."""
    spec = HUB[kind]
    if coarse and not spec.coarse:
        raise UserError(f"{spec.title} has no super-classes; image.coarse is for cifar100")
    repository = spec.repository if copy is None else str(copy)
    train, test = (
        _hub_split(spec, repository, hub_table(spec.title, repository, spec.config, split, spec.advice), coarse)
        for split in ("train", spec.test)
    )
    return train, test


def _hub_split(spec: HubSet, repository: str, table: Any, coarse: bool) -> ImageSource:
    def column(name: str) -> tuple[tuple[str, ...], np.ndarray]:
        names = getattr(table.features.get(name), "names", None)
        if names is None or spec.image not in table.features:
            has = ", ".join(table.features)
            raise UserError(f"{repository}: needs a column '{spec.image}' and classes in '{name}' (has: {has})")
        # the idx files of the same data hold no names: both ways give the same corpus
        return FASHION_CLASSES if spec.title == "Fashion-MNIST" else tuple(names), np.array(table[name][:], np.int64)

    def read(at: Iterable[int]) -> Iterator[np.ndarray]:
        for i in at:
            where = f"{repository}: image {i}"
            try:
                picture = table[int(i)][spec.image]
            except (OSError, ValueError, SyntaxError) as error:
                raise UserError(f"{where} cannot be decoded ({str(error)[:80]}); fetch the data again") from None
            if picture is None:
                raise UserError(f"{where} is missing; fetch the data again")
            yield rgb(picture, spec.mode, where)

    fine, labels = column(spec.label)
    if not coarse:
        return ImageSource(repository, fine, labels, read)
    above, above_labels = column(spec.coarse)
    return ImageSource(repository, above, above_labels, read, fine, labels)


def open_local(kind: str, path: Path, coarse: bool = False) -> Splits:
    """Read what a file or folder turns out to hold. Raises UserError naming what it may hold."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; data.path names the images of kind {kind}")
    if kind == "npz" or path.suffix == ".npz" or (path / "train.npz").exists():
        if path.is_dir() and not (path / "train.npz").exists():
            raise UserError(f"{path}: no train.npz in it; {NO_PICKLE}")
        return open_npz(path, coarse)
    if not path.is_dir():
        raise UserError(f"{path}: is no npz archive nor a folder; {NO_PICKLE}")
    if kind in HUB and next(path.rglob("*.parquet"), None) is not None:
        return open_hub(kind, path, coarse)
    if coarse:
        raise UserError(f"{path}: super-classes (image.coarse) are read from npz or cifar100 of the hub only")
    if kind == "fashion_mnist" and not any(p.is_dir() for p in path.iterdir()):
        return open_idx(path)
    return open_folder(path)
