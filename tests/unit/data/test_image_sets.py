"""Image data sets: which images are trained and tested, how pixels are prepared, every form they are read from."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.config import build_config
from llm_unlearn.data import image_sets
from llm_unlearn.data.image_files import FASHION_CLASSES, HUB, open_folder, open_hub
from llm_unlearn.data.image_sets import IMAGE_KINDS, ImageConfig, image_corpus
from llm_unlearn.data.images import Classes, ImageRow, corpus_classes
from llm_unlearn.data.schema import check_unique
from llm_unlearn.errors import UserError

NAMES = ("ant", "bee", "cow")


def corpus(kind: str = "digits", path: Path | None = None, seed: int = 0, **config):
    return image_corpus(kind, ImageConfig(**config), None if path is None else str(path), seed)


def questions(made, split: str) -> list[str]:
    return [row.question for row in made.split(split)]


def stacked(made, split: str) -> np.ndarray:
    return np.stack([row.pixels for row in made.split(split)])


def write_npz(path: Path, n: int = 30, side: int = 6, **changes) -> Path:
    """An archive of 3 classes whose image i is filled with i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, side, side, 3))
    arrays = {"images": images, "labels": np.arange(n) % 3, "classes": np.array(NAMES)}
    np.savez(path, **{name: x for name, x in (arrays | changes).items() if x is not None})
    return path


# --- the draw


def test_digits_are_the_default_of_the_study():
    made = corpus()
    train, test = made.split("train"), made.split("test")
    assert (len(train), len(test), made.kind, made.name) == (400, 790, "image", "digits")
    assert set(Counter(row.answer for row in train).values()) == {40}
    assert set(Counter(row.answer for row in test).values()) == {79}
    assert made.meta["classes"] == list("0123456789")
    assert made.meta["shape"] == [1, 8, 8]
    assert made.meta["config"]["kind"] == "digits"
    for row in (*train, *test):
        assert row.pixels.shape == (1, 8, 8)
        assert row.pixels.dtype == np.float32
        assert row.pixels.flags["C_CONTIGUOUS"]
    whole = stacked(made, "train") * 16
    assert np.array_equal(whole, whole.round())
    assert whole.max() == 16


def test_digits_are_the_images_their_identity_names():
    from sklearn.datasets import load_digits

    data = load_digits()
    for row in (*corpus().split("train"), *corpus().split("test")):
        at = int(row.question.split("/")[1])
        assert np.array_equal(row.pixels[0] * 16, data.images[at])
        assert row.answer == str(data.target[at])


def test_a_row_is_what_the_contract_says():
    made = corpus(clusters=3)
    row = made.split("train")[5]
    assert isinstance(row, ImageRow)
    assert row.author == row.fact_id == row.question == row.facts[0]
    assert (row.relation, row.template, row.hop) == ("class", "", 1)
    assert row.facts[1] == f"class:{row.answer}"
    assert row.facts[2] in {f"subclass:{row.answer}.{k}" for k in range(3)}
    assert len(row.facts) == 3
    assert all(len(row.facts) == 2 for row in corpus(clusters=1).split("train"))
    for split in ("train", "test"):
        check_unique(made.split(split), split)
    assert corpus_classes(made).encode([(row, row.answer)])[0].label == int(row.answer)
    assert isinstance(corpus_classes(made), Classes)


def test_the_seed_draws_the_training_images_alone():
    first, again, other = corpus(seed=1), corpus(seed=1), corpus(seed=2)
    assert first.splits == again.splits
    assert first.meta == again.meta
    assert questions(first, "train") != questions(other, "train")
    assert questions(first, "test") == questions(other, "test")
    assert np.array_equal(stacked(first, "test"), stacked(other, "test"))
    assert first.meta["pixels"] != other.meta["pixels"]


@pytest.mark.parametrize("seed", range(3))
def test_training_and_test_share_no_image(seed):
    for n in (400, None):
        made = corpus(seed=seed, train=n)
        places = [{q.split("/")[1] for q in questions(made, split)} for split in ("train", "test")]
        assert not places[0] & places[1]
    assert len(places[0] | places[1]) == 1797


def test_validation_images_are_training_images_that_are_not_trained():
    plain, made, other = corpus(seed=1), corpus(seed=1, val=400), corpus(seed=2, val=400)
    assert set(plain.splits) == {"train", "test"}
    assert set(Counter(row.answer for row in made.split("val")).values()) == {40}
    for split in ("train", "test"):
        assert made.split(split) == plain.split(split), "what is trained and measured stays"
    places = [{q.split("/")[1] for q in questions(made, split)} for split in ("train", "test", "val")]
    assert len(set.union(*places)) == 400 + 790 + 400
    assert all(row.question.startswith("val/") and row.facts[2].startswith("subclass:") for row in made.split("val"))
    assert len({data.meta["pixels"] for data in (plain, made, other)}) == 3
    with pytest.raises(UserError, match=r"has \d+ images to draw from, image.val=800 needs 80; lower image.val"):
        corpus(val=800)


def test_validation_images_of_files_are_prepared_like_those_trained(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
    path = write_npz(tmp_path / "a.npz", n=60, test_images=images, test_labels=np.arange(12) % 3)
    made = corpus("npz", path, train=30, val=15, test=6, normalise="standard", clusters=1)
    assert {name: len(rows) for name, rows in made.splits.items()} == {"train": 30, "test": 6, "val": 15}
    first = {int(row.question.split("/")[1]): row.pixels.mean() for row in (*made.split("train"), *made.split("val"))}
    steps = [(first[b] - first[a]) / (b - a) for a, b in zip(sorted(first), sorted(first)[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 44, rel=1e-3), "image i is filled with i: one scale for both splits"


@pytest.mark.parametrize(("kind", "start"), [("digits", "0862c387ecac"), ("colours", "035b7ffa67c2")])
def test_the_built_in_data_never_change(kind, start):
    """Published runs rest on these draws: another hash means other images under the same seed."""
    assert corpus(kind).meta["pixels"].startswith(start)


def test_a_larger_subset_keeps_the_images_of_the_smaller():
    small, large = (set(questions(corpus(train=n, seed=3), "train")) for n in (300, 400))
    assert small < large


def test_what_is_left_over_goes_to_classes_one_image_each():
    counts = Counter(row.answer for row in corpus(train=204).split("train"))
    assert sorted(counts.values()) == [20] * 6 + [21] * 4


def test_the_hash_covers_pixels_and_labels(tmp_path):
    made = [
        corpus("npz", write_npz(tmp_path / f"{i}.npz", **changes), train=6, test=6, clusters=1).meta["pixels"]
        for i, changes in enumerate(
            [{}, {}, {"images": np.zeros((30, 6, 6), np.uint8)}, {"classes": np.array(list("abc"))}]
        )
    ]
    assert made[0] == made[1] == made[3]
    assert made[2] != made[0]


# --- sub-classes


def test_clusters_are_those_of_the_pixels_largest_first(tmp_path):
    bright = (np.arange(60) % 5 == 0).astype(np.uint8)  # a fifth of every class
    images = np.repeat(bright * 200 + np.arange(60, dtype=np.uint8) // 10, 16).reshape(60, 4, 4)
    path = write_npz(tmp_path / "a.npz", 60, images=images)
    made = corpus("npz", path, train=None, test=15)
    for row in (*made.split("train"), *made.split("test")):
        at = int(row.question.split("/")[1])
        assert row.facts[2] == f"subclass:{row.answer}.{bright[at]}"


def test_colours_have_sub_classes_of_their_own():
    made = corpus("colours", train=40)
    assert made.meta["shape"] == [3, 32, 32]
    assert len(made.meta["classes"]) == 10
    assert len({row.facts[2] for row in made.split("test")}) == 40
    assert made.split("train")[0].facts[2].split(".")[1] in ("disc", "square", "cross", "triangle")
    assert len({row.pixels.tobytes() for row in (*made.split("train"), *made.split("test"))}) == 840


def test_colours_can_be_told_apart_from_their_pixels_only_in_colour():
    """The strongest hue of an image, compared with the mean of each class, names the class far above chance."""

    def accuracy(**config) -> float:
        made = corpus("colours", train=400, **config)
        x, y = ({s: np.asarray(v) for s, v in d.items()} for d in (
            {s: _colour(stacked(made, s)) for s in ("train", "test")},
            {s: [row.answer for row in made.split(s)] for s in ("train", "test")},
        ))  # fmt: skip
        centres = np.stack([x["train"][y["train"] == name].mean(0) for name in made.meta["classes"]])
        nearest = ((x["test"][:, None] - centres) ** 2).sum(-1).argmin(1)
        return float((np.array(made.meta["classes"])[nearest] == y["test"]).mean())

    assert accuracy() > 0.6
    assert accuracy(gray=True) < 0.3


def _colour(images: np.ndarray) -> np.ndarray:
    flat = images.mean((2, 3))
    flat = flat - flat.mean(1, keepdims=True)
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9)


# --- pixels


def test_pooling_averages_areas_parts_of_pixels_included(tmp_path):
    rows = np.arange(3, dtype=np.float64)[None, :, None] / 4
    images = np.broadcast_to(rows, (30, 3, 3))  # rows 0, 1/4, 1/2
    path = write_npz(tmp_path / "a.npz", images=images + np.arange(30)[:, None, None] / 100)
    made = corpus("npz", path, train=3, test=3, size=2, clusters=1)
    row = made.split("train")[0]
    offset = int(row.question.split("/")[1]) / 100
    # 1.5 rows each: (0 + .5 * .25) / 1.5 and (.5 * .25 + .5) / 1.5
    assert row.pixels[0] == pytest.approx(np.array([[1 / 12] * 2, [5 / 12] * 2]) + offset)


def test_pooling_by_a_whole_factor_is_the_mean_of_blocks(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    path = write_npz(tmp_path / "a.npz", images=images)
    row = corpus("npz", path, train=3, test=3, size=4, clusters=1).split("test")[1]
    blocks = images[int(row.question.split("/")[1])].reshape(4, 2, 4, 2, 3).mean((1, 3)) / 255
    assert row.pixels == pytest.approx(np.moveaxis(blocks, 2, 0), abs=1e-6)


def test_a_wide_image_loses_its_sides(tmp_path):
    images = np.zeros((30, 4, 8), np.uint8)
    images[:, :, 2:6] = 255
    path = write_npz(tmp_path / "a.npz", images=images)
    assert (stacked(corpus("npz", path, train=3, test=3, size=2, clusters=1), "train") == 1).all()
    assert corpus("npz", path, train=3, test=3, clusters=1).meta["shape"] == [1, 4, 8]


def test_gray_is_luminance(tmp_path):
    images = np.zeros((30, 2, 2, 3), np.uint8)
    images[..., 1] = 255
    made = corpus("npz", write_npz(tmp_path / "a.npz", images=images), train=3, test=3, gray=True, clusters=1)
    assert made.meta["shape"] == [1, 2, 2]
    assert stacked(made, "train") == pytest.approx(0.587)


def test_standard_pixels_have_the_training_channels_mean_0_and_deviation_1():
    made = corpus("colours", train=100, normalise="standard")
    train, test = stacked(made, "train"), stacked(made, "test")
    assert train.mean((0, 2, 3)) == pytest.approx(np.zeros(3), abs=1e-5)
    assert train.std((0, 2, 3)) == pytest.approx(np.ones(3), abs=1e-5)
    assert abs(test.mean()) > 1e-4  # the test images are scaled by the training images, not by their own
    assert np.ptp(test.mean((0, 2, 3))) < 0.5


# --- files


def test_npz_of_one_file_two_splits_or_two_files_agree(tmp_path):
    write_npz(tmp_path / "one.npz", test_images=np.full((6, 6, 6, 3), 9, np.uint8), test_labels=np.arange(6) % 3)
    (tmp_path / "two").mkdir()
    write_npz(tmp_path / "two/train.npz")
    write_npz(tmp_path / "two/test.npz", 6, images=np.full((6, 6, 6, 3), 9, np.uint8))
    one, two = (corpus("npz", tmp_path / name, train=12, seed=4) for name in ("one.npz", "two"))
    assert one.splits == two.splits
    assert one.meta == two.meta
    assert len(one.split("test")) == 6
    row = one.split("train")[2]
    at = int(row.question.split("/")[1])
    assert row.pixels == pytest.approx(at / 255)
    assert row.answer == NAMES[at % 3]


def test_npz_of_two_levels_has_the_fine_classes_as_sub_classes(tmp_path):
    extra = {"coarse_labels": np.arange(30) % 3 // 2, "coarse_classes": np.array(["insect", "mammal"])}
    path = write_npz(tmp_path / "a.npz", **extra)
    made = corpus("npz", path, train=4, test=4, coarse=True)
    assert made.meta["classes"] == ["insect", "mammal"]
    assert {row.facts[2] for row in made.split("test")} <= {
        "subclass:insect.ant",
        "subclass:insect.bee",
        "subclass:mammal.cow",
    }
    assert corpus("npz", path, train=6, test=6).meta["classes"] == list(NAMES)


def write_idx(folder: Path, packed: bool) -> None:
    folder.mkdir(exist_ok=True)
    for prefix, n in (("train", 40), ("t10k", 20)):
        images = struct.pack(">4I", 0x803, n, 4, 4) + bytes(i for i in range(n) for _ in range(16))
        labels = struct.pack(">2I", 0x801, n) + bytes(i % 10 for i in range(n))
        for name, data in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            (folder / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)


def test_idx_plain_and_packed_agree(tmp_path, monkeypatch):
    write_idx(tmp_path / "a", packed=False)
    write_idx(tmp_path / "b", packed=True)
    plain, packed = (corpus("fashion_mnist", tmp_path / name, train=20) for name in "ab")
    assert plain.splits == packed.splits
    assert plain.meta == packed.meta
    row = plain.split("test")[13]
    assert (row.question, row.answer) == ("test/13", "Dress")
    assert row.pixels == pytest.approx(13 / 255)
    monkeypatch.setattr(image_sets, "FASHION_FOLDER", tmp_path / "b")
    assert corpus("fashion_mnist", train=20).meta == packed.meta


def write_pictures(folder: Path, n: int = 4, mode: str = "RGB", side: int = 5) -> None:
    from PIL import Image

    for k, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            colour = (40 * k + i, 7, 9) if mode == "RGB" else 40 * k + i
            Image.new(mode, (side, side), colour).save(folder / name / f"{i}.png")


def test_folders_of_pictures(tmp_path):
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "val", 2)
    (tmp_path / "train/ant/notes.txt").write_text("no picture")
    made = corpus("image_folder", tmp_path, train=None)
    assert made.meta["classes"] == list(NAMES)
    assert made.meta["shape"] == [3, 5, 5]
    assert [len(made.split(s)) for s in ("train", "test")] == [12, 6]
    row = made.split("test")[3]
    assert row.answer == "bee"
    assert row.pixels[:, 0, 0] == pytest.approx(np.array([41, 7, 9]) / 255)
    alone = corpus("image_folder", tmp_path / "train", train=6, test=3)
    assert {row.question.split("/")[0] for row in alone.split("test")} == {"test"}


def test_gray_pictures_among_colours_become_colours(tmp_path):
    write_pictures(tmp_path, mode="L")
    train, test = open_folder(tmp_path)
    assert test is None
    assert all(image.shape == (5, 5, 3) and np.ptp(image, axis=2).max() == 0 for image in train.read(range(12)))


@pytest.fixture(scope="module")
def hub_rows():
    """One small table as the hub has it: pictures, fine labels and coarse labels."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=["rose", "tulip", "cod", "eel"]),
        coarse_label=datasets.ClassLabel(names=["flower", "fish"]),
    )
    rows = {
        "img": list(rng.integers(0, 256, (24, 4, 4, 3), np.uint8)),
        "fine_label": [i % 4 for i in range(24)],
        "coarse_label": [i % 4 // 2 for i in range(24)],
    }
    return datasets.Dataset.from_dict(rows, features=features), np.stack(rows["img"])


def _fake_hub(monkeypatch, table, asked: list) -> None:
    def load(*what: str, split: str):
        asked.append((*what, split))
        return table

    fake = types.SimpleNamespace(load_dataset=load, config=types.SimpleNamespace(HF_DATASETS_CACHE="cache-folder"))
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_hub_gives_fine_and_coarse_classes(hub_rows, monkeypatch):
    table, images = hub_rows
    asked: list = []
    _fake_hub(monkeypatch, table, asked)
    fine = corpus("cifar100", train=8, test=4)
    assert asked == [("uoft-cs/cifar100", "cifar100", "train"), ("uoft-cs/cifar100", "cifar100", "test")]
    assert fine.meta["classes"] == ["rose", "tulip", "cod", "eel"]
    row = fine.split("train")[3]
    assert np.moveaxis(row.pixels, 0, 2) == pytest.approx(images[int(row.question.split("/")[1])] / 255)
    coarse = corpus("cifar100", train=8, test=4, coarse=True)
    assert coarse.meta["classes"] == ["flower", "fish"]
    assert {row.facts[2] for row in coarse.split("train")} <= {
        f"subclass:{name}" for name in ("flower.rose", "flower.tulip", "fish.cod", "fish.eel")
    }


def test_a_copy_of_a_repository_is_read_without_the_hub(hub_rows, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table, images = hub_rows
    for split in ("train", "test"):
        (tmp_path / "copy/data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / f"copy/data/{split}-00000-of-00001.parquet")
    (tmp_path / "copy/README.md").write_text(
        "---\nconfigs:\n- config_name: cifar100\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n---\n"
    )
    made = corpus("cifar100", tmp_path / "copy", train=8)
    assert len(made.split("test")) == 24
    assert np.moveaxis(stacked(made, "test"), 1, 3) == pytest.approx(images / 255)


def test_every_kind_of_the_hub_is_a_kind():
    assert set(HUB) < set(IMAGE_KINDS)
    assert len(FASHION_CLASSES) == 10


def test_built_in_kinds_and_local_files_never_touch_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_idx(tmp_path / "idx", packed=True)
    write_npz(tmp_path / "a.npz")
    write_pictures(tmp_path / "pictures/train")
    for kind, path, test in (
        ("digits", None, None),
        ("colours", None, None),
        ("fashion_mnist", tmp_path / "idx", None),
        ("cifar10", tmp_path / "a.npz", 6),
        ("svhn", tmp_path / "pictures", 3),
    ):
        assert len(corpus(kind, path, train=None if test is None else 6, test=test).split("test")) > 0


def test_fashion_classes_are_ours_from_the_hub_too(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"other {i}" for i in range(10)])
    )
    rows = {"image": list(np.zeros((10, 4, 4), np.uint8)), "label": list(range(10))}
    _fake_hub(monkeypatch, datasets.Dataset.from_dict(rows, features=features), [])
    train, _ = open_hub("fashion_mnist")
    assert train.classes == FASHION_CLASSES
    assert next(train.read([3])).shape == (4, 4)


def test_the_config_is_a_section_like_any_other():
    assert build_config(ImageConfig, {"train": None, "size": 14}) == ImageConfig(train=None, size=14)
    assert all(field.description for field in ImageConfig.model_fields.values())


def test_the_real_cifar10_subset(test_data):
    folder = test_data / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"LLM_UNLEARN_TEST_DATA has no {folder.name}")
    made = corpus("cifar10", folder, train=500, seed=1)
    assert made.meta["shape"] == [3, 32, 32]
    assert made.meta["classes"][:2] == ["airplane", "automobile"]
    assert set(Counter(row.answer for row in made.split("train")).values()) == {50}
    assert set(Counter(row.answer for row in made.split("test")).values()) == {200}
    with np.load(folder / "train.npz") as archive:
        images, labels, classes = (archive[name] for name in ("images", "labels", "classes"))
    for row in made.split("train")[::50]:
        at = int(row.question.split("/")[1])
        assert row.answer == classes[labels[at]]
        assert np.array_equal((row.pixels * 255).round(), np.moveaxis(images[at], 2, 0))
    pooled = corpus("cifar10", folder, train=None, size=16, gray=True, clusters=1)
    assert len(pooled.split("train")) == 5000
    assert pooled.meta["shape"] == [1, 16, 16]
