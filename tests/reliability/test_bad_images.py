"""Images that cannot be used: exactly one line that says what, where and how to mend it."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm_unlearn.config import build_config
from llm_unlearn.data import image_sets
from llm_unlearn.data.image_sets import ImageConfig, image_corpus
from llm_unlearn.errors import UserError

pytestmark = pytest.mark.reliability

N = 30


def refusal(kind: str, path: Path | None = None, **config) -> str:
    with pytest.raises(UserError) as error:
        image_corpus(kind, ImageConfig(**{"train": 6, "test": 6, **config}), None if path is None else str(path), 0)
    message = str(error.value)
    assert "\n" not in message
    return message


def good(**changes) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), np.uint8)
    arrays = {"images": images, "labels": np.arange(N) % 3, "classes": np.array(["ant", "bee", "cow"])}
    return {name: x for name, x in (arrays | changes).items() if x is not None}


def floats(value: float) -> np.ndarray:
    out = np.zeros((N, 4, 4))
    out[:, 1, 2] = value
    return out


def test_the_good_archive_is_good(tmp_path):
    np.savez(tmp_path / "a.npz", **good())
    made = image_corpus("npz", ImageConfig(train=6, test=6), str(tmp_path / "a.npz"), 0)
    assert len(made.split("train")) == 6


ARCHIVES = {
    "no images": (good(images=None), "no array 'images' (has: labels, classes)"),
    "no labels": (good(labels=None), "no array 'labels'"),
    "no classes": (good(classes=None), "no array 'classes'"),
    "no test labels": (good(test_images=floats(0)), "no array 'test_labels'"),
    "other arrays": ({"x": np.zeros(3)}, "no array 'images' (has: nothing known)"),
    "object images": (good(images=np.array([np.zeros((2, 2)), None], object)), "holds pickled objects; pickle and"),
    "object classes": (good(classes=np.array(["ant", "bee", None], object)), "never read: convert to npz"),
    "flat": (good(images=np.zeros((N, 48), np.uint8)), "'images' must be (N, H, W) or (N, H, W, C), got (30, 48)"),
    "channels first": (good(images=np.zeros((N, 3, 4, 4), np.uint8)), "has shape (3, 4, 4); needed are"),
    "no pixels": (good(images=np.zeros((N, 0, 4), np.uint8)), "has shape (0, 4)"),
    "no rows": (good(images=np.zeros((0, 4, 4), np.uint8), labels=np.zeros(0, int)), "no images"),
    "labels too few": (
        good(labels=np.zeros(7, int)),
        "'labels' must be 30 whole numbers, one an image, got int64 (7,)",
    ),
    "float labels": (good(labels=np.zeros(N)), "'labels' must be 30 whole numbers, one an image, got float64"),
    "one-hot labels": (good(labels=np.zeros((N, 3), int)), "got int64 (30, 3)"),
    "label too large": (good(labels=np.arange(N) % 4), "label 3 of image 3 is out of range (3 classes"),
    "label negative": (good(labels=np.arange(N) % 3 - 1), "label -1 of image 0 is out of range"),
    "numbers as classes": (good(classes=np.arange(3)), "'classes' must be a list of texts, got int64 (3,)"),
    "class twice": (
        good(classes=np.array(["ant", "ant", "cow"])),
        "class names must be there, different and not empty",
    ),
    "empty class name": (good(classes=np.array(["ant", " ", "cow"])), "different and not empty"),
    "class unused": (good(classes=np.array(["ant", "bee", "cow", "yak"])), "class 'yak' has 0 images to draw from"),
    "NaN": (good(images=floats(np.nan)), "has pixels that are NaN or infinite"),
    "infinite": (good(images=floats(np.inf)), "has pixels that are NaN or infinite"),
    "floats to 255": (good(images=floats(255.0)), "has pixels from 0 to 255; floats must be from 0 to 1"),
    "floats below 0": (good(images=floats(-1.0)), "has pixels from -1 to 0"),
    "int64 images": (good(images=np.zeros((N, 4, 4), np.int64)), "is int64; needed are uint8, or floats from 0 to 1"),
    "all alike": (good(images=floats(0)), "has fewer than 2 different training images; lower image.clusters"),
    "test of another size": (
        good(test_images=np.zeros((6, 5, 5, 3), np.uint8), test_labels=np.arange(6) % 3),
        "test images are 5x5x3, training images 4x4x3; set image.size",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(tmp_path, case):
    arrays, expected = ARCHIVES[case]
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)  # pickles objects, as a careless user would
    message = refusal("npz", path)
    assert message.startswith(str(path))
    assert expected in message


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def _npy(path: Path) -> bytes:
    np.save(path.with_suffix(".npy"), np.zeros(3))
    return path.with_suffix(".npy").read_bytes()


def _whole(path: Path) -> bytes:
    np.savez_compressed(path, **good())
    return path.read_bytes()


def _huge(path: Path) -> bytes:
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 32, 32), }".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
    return path.read_bytes()


BYTES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda path: b"", "is no whole npz archive"),
    "text": (lambda path: b"hello, world", "never read: convert to npz"),
    "zip cut off": (lambda path: _whole(path)[:-200], "npz archive"),
    "bytes changed": (lambda path: _whole(path)[:200] + bytes(80) + _whole(path)[280:], "npz archive"),
    "npy": (_npy, "is one array, no npz archive"),
    "promises terabytes": (_huge, "npz archive"),
}


@pytest.mark.parametrize("case", BYTES)
def test_archives_that_are_none(tmp_path, case):
    make, expected = BYTES[case]
    path = tmp_path / "a.npz"
    path.write_bytes(make(path))
    message = refusal("npz", path)
    assert message.startswith(str(path))
    assert expected in message


@pytest.mark.parametrize("name", ["data_batch_1", "train", "a.pkl", "a.npz"])
def test_pickles_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"data": Bomb(tmp_path / "ran")}))
    assert "pickle and MATLAB archives are never read: convert to npz" in refusal("cifar10", tmp_path / name)
    if name != "a.npz":
        assert "never read: convert to npz" in refusal("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_two_files_must_name_the_same_classes(tmp_path):
    np.savez(tmp_path / "train.npz", **good())
    np.savez(tmp_path / "test.npz", **good(classes=np.array(["ant", "cow", "bee"])))
    assert "names other classes than" in refusal("npz", tmp_path)


# --- too few


def test_more_than_there_are():
    assert "1200 training + 790 test images of 1797; lower" in refusal("digits", train=1200, test=None)
    assert "class '0' has 99 images to draw from, image.train=1000 needs 100" in refusal(
        "digits", train=1000, test=None
    )
    assert "image.test=1790 needs 179; lower image.test" in refusal("digits", train=None, test=1790)
    assert "image.test=1000 needs 100" in refusal("colours", test=1000)
    assert "image.train=6: digits has 10 classes; each needs an image" in refusal("digits", test=None)
    assert "fewer than 20 different training images" in refusal("digits", train=100, test=None, clusters=20)


def test_a_class_the_test_set_used_up(tmp_path):
    labels = np.r_[np.zeros(28), 1, 2].astype(int)
    np.savez(tmp_path / "a.npz", **good(labels=labels))
    assert "class 'bee' has no training image" in refusal("npz", tmp_path / "a.npz", train=None, test=3)


def test_data_without_a_test_set_need_a_number(tmp_path):
    np.savez(tmp_path / "a.npz", **good())
    assert "has no test images of its own; say how many to keep apart: image.test" in refusal(
        "npz", tmp_path / "a.npz", test=None
    )


def test_a_channel_without_contrast(tmp_path):
    np.savez(tmp_path / "a.npz", **good(images=floats(0)))
    assert "a channel is the same in all" in refusal("npz", tmp_path / "a.npz", normalise="standard", clusters=1)


# --- kinds and options


def test_kinds_and_options(tmp_path):
    assert refusal("digit") == "unknown image data 'digit'; did you mean 'digits'?"
    assert "digits are built in and take no data.path" in refusal("digits", tmp_path)
    assert "colours are built in and take no image.coarse" in refusal("colours", coarse=True)
    assert "npz: needs data.path" in refusal("npz")
    assert "image_folder: needs data.path" in refusal("image_folder")
    assert "CIFAR-10 has no super-classes; image.coarse is for cifar100" in refusal("cifar10", coarse=True)
    assert "no such file or folder" in refusal("svhn", tmp_path / "gone")
    assert "no <class>/<picture> in it; pickle" in refusal("svhn", tmp_path)
    assert "no train.npz in it; pickle" in refusal("npz", tmp_path)
    np.savez(tmp_path / "a.npz", **good())
    assert "no array 'coarse_labels'" in (message := refusal("npz", tmp_path / "a.npz", coarse=True))
    assert "image.coarse needs it" in message
    assert "smaller than image.size=5; lower it" in refusal("npz", tmp_path / "a.npz", size=5)
    for bad in ({"train": 0}, {"test": -1}, {"size": 1}, {"clusters": 0}, {"normalise": "none"}, {"train": "all"}):
        with pytest.raises(UserError, match=next(iter(bad))):
            build_config(ImageConfig, bad)


def test_offline_says_where_it_looked_and_what_to_do(monkeypatch, tmp_path):
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    fake = types.SimpleNamespace(load_dataset=load, config=types.SimpleNamespace(HF_DATASETS_CACHE="cache-folder"))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for kind, repository in (("cifar10", "uoft-cs/cifar10"), ("imagenet100", "clane9/imagenet-100")):
        message = refusal(kind)
        for part in (repository, "cache-folder", "Couldn't reach the Hub", "data.path=FOLDER", "train.npz"):
            assert part in message
    monkeypatch.setattr(image_sets, "FASHION_FOLDER", tmp_path / "none")
    message = refusal("fashion_mnist")
    for part in ("zalando-datasets/fashion_mnist", "package dataset-fashion-mnist", "four idx files"):
        assert part in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the library datasets" in refusal("svhn")


def _hub(monkeypatch, features, rows) -> None:
    import datasets

    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    fake = types.SimpleNamespace(load_dataset=lambda *_, **__: table, config=datasets.config)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_tables_that_are_not_the_data_set(monkeypatch):
    import datasets

    label, image = datasets.ClassLabel(names=["a", "b"]), datasets.Image()
    pictures = list(np.zeros((4, 4, 4, 3), np.uint8))
    with monkeypatch.context() as patch:
        _hub(patch, {"image": image, "label": label}, {"image": pictures, "label": [0, 1, 0, 1]})
        assert "needs a column 'img' and classes in 'label' (has: image, label)" in refusal("cifar10")
    with monkeypatch.context() as patch:
        _hub(patch, {"img": image, "label": datasets.Value("int64")}, {"img": pictures, "label": [0, 1, 0, 1]})
        assert "needs a column 'img' and classes in 'label'" in refusal("cifar10")
    with monkeypatch.context() as patch:
        _hub(patch, {"img": image, "label": label}, {"img": pictures, "label": [0, 1, 0, -1]})
        assert "label -1 of image 3 is out of range" in refusal("cifar10")
    with monkeypatch.context() as patch:
        _hub(patch, {"img": image, "label": label}, {"img": [*pictures[:3], None], "label": [0, 1, 0, 1]})
        assert "uoft-cs/cifar10: image 3 is missing" in refusal("cifar10", train=None, test=2)
    with monkeypatch.context() as patch:
        broken = {"bytes": b"no picture", "path": None}
        _hub(patch, {"img": image, "label": label}, {"img": [*pictures[:3], broken], "label": [0, 1, 0, 1]})
        assert "image 3 cannot be decoded" in refusal("cifar10", train=None, test=2)


# --- idx


def _idx(folder: Path) -> None:
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 20, 2, 2) + bytes(range(80)))
        labels = struct.pack(">2I", 0x801, 20) + bytes(i % 10 for i in range(20))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


IDX: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "missing": ("t10k-labels-idx1-ubyte", lambda data: None, "no t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"),
    "empty": ("train-images-idx3-ubyte", lambda data: b"", "begins with nothing"),
    "labels for images": (
        "train-images-idx3-ubyte",
        lambda data: struct.pack(">2I", 0x801, 4) + bytes(4),
        "begins with 00000801, an idx file of bytes in 3 dimensions with 00000803",
    ),
    "cut off": ("train-images-idx3-ubyte", lambda data: data[:-1], "holds 79 bytes, its header promises (20, 2, 2)"),
    "head cut off": ("train-images-idx3-ubyte", lambda data: data[:9], "its header promises"),
    "too long": ("t10k-images-idx3-ubyte", lambda data: data + b"x", "holds 81 bytes"),
    "promises too much": (
        "train-images-idx3-ubyte",
        lambda data: data[:4] + b"\xff" * 12 + data[16:],
        "holds 80 bytes, its header promises (4294967295, ",
    ),
    "packed and cut off": ("train-images-idx3-ubyte", lambda data: gzip.compress(data)[:-9], "no whole gzip file"),
    "packed and changed": (
        "train-images-idx3-ubyte",
        lambda data: gzip.compress(data)[:20] + bytes(20) + gzip.compress(data)[40:],
        "no whole gzip file",
    ),
    "label 10": ("train-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a", "label 10 of image 19 is out of range"),
    "labels too few": (
        "train-labels-idx1-ubyte",
        lambda data: struct.pack(">2I", 0x801, 19) + data[8:-1],
        "19 labels for the 20 images of train-images-idx3-ubyte",
    ),
}


@pytest.mark.parametrize("case", IDX)
def test_idx(tmp_path, case):
    name, change, expected = IDX[case]
    _idx(tmp_path)
    changed = change((tmp_path / name).read_bytes())
    (tmp_path / name).unlink() if changed is None else (tmp_path / name).write_bytes(changed)
    message = refusal("fashion_mnist", tmp_path, train=10, test=10)
    assert message.startswith(str(tmp_path))
    assert expected in message


# --- pictures


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (4, 4), (50 * k, i, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_pictures_that_are_none(pictures):
    path = pictures / "train/bee/1.png"
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        message = refusal("image_folder", pictures)
        assert message.startswith(f"{path}: no picture that can be read")
    Image.new("I;16", (4, 4), 40000).save(path)
    assert "has more than 8 bits a pixel (mode I;16)" in refusal("image_folder", pictures)


def test_pictures_of_unequal_size_need_a_size(pictures):
    Image.new("RGB", (6, 5), (1, 2, 3)).save(pictures / "train/bee/1.png")
    message = refusal("image_folder", pictures)
    assert "image 4 is 5x6x3, image 0 4x4x3; all must be equal: set image.size" in message
    made = image_corpus("image_folder", ImageConfig(train=6, size=3), str(pictures), 0)
    assert made.meta["shape"] == [3, 3, 3]


def test_folders_of_unknown_and_empty_classes(pictures):
    (pictures / "test/bees").mkdir()
    assert "unknown class, no training picture has it; did you mean 'bee'?" in refusal("image_folder", pictures)
    (pictures / "test/bees").rmdir()
    (pictures / "train/cow").mkdir()
    (pictures / "train/cow/notes.txt").write_text("none")
    assert f"{pictures / 'train/cow'}: no pictures" in refusal("image_folder", pictures)
