"""Images beside what was said of them: from the run's own data, into a page that fetches nothing."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llm_unlearn.config import build_config
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.report.answers import answer_rows
from llm_unlearn.report.collect import report_data
from llm_unlearn.report.html import render
from llm_unlearn.report.pictures import LARGEST, data_uri, pictures

DATA = {"kind": "npz", "image": {"train": None, "test": None, "clusters": 1}}
N = 12


@pytest.fixture
def data(tmp_path):
    """Twelve images of 4 x 4 pixels in two classes, image i of brightness 20 i."""
    images = np.broadcast_to(20 * np.arange(N, dtype=np.uint8)[:, None, None], (N, 4, 4))
    labels, names = np.arange(N) % 2, np.array(["cat", "<b>dog</b>"])
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=labels, classes=names, test_images=images, test_labels=labels)
    return {**DATA, "path": str(path)}


@pytest.fixture
def run(tmp_path, data, make_outcome, outcome_folder):
    """An unlearned run over that data whose results name image 3 (forgotten) and image 4 (kept)."""

    def answered(said):
        return [
            {"split": s, "question": q, "answer": a, "generation": said, "probability": 0.25}
            for s, q, a in (("forget", "train/3", "<b>dog</b>"), ("retain", "train/4", "cat"))
        ]

    folder = tmp_path / "study" / "run"
    texts = {who: answered(name) for who, name in (("after", "cat"), ("gold", "cat"), ("start", "<b>dog</b>"))}
    made = make_outcome(folder=folder, texts=texts)
    outcome_folder(folder, made)
    results = folder / "eval-final" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "data": "image"}))
    config = json.loads((folder / "run.json").read_text())["origin"]["config"]
    digest = open_corpus(build_config(DataConfig, data)).identity
    origin = {"config": {**config, "data": data}, "data": digest}
    (folder / "run.json").write_text(json.dumps({"kind": "unlearn", "origin": origin}))
    return replace(made, data="image")


def opened(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_a_picture_is_the_image():
    gray = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    np.testing.assert_array_equal(opened(data_uri(gray)), np.rint(255 * gray[0]))
    colour = np.random.default_rng(0).random((3, 5, 5), dtype=np.float32)
    np.testing.assert_array_equal(opened(data_uri(colour)), np.rint(255 * np.moveaxis(colour.astype(float), 0, 2)))


def test_a_normalised_image_is_stretched_and_a_large_one_made_small():
    shown = opened(data_uri(np.array([[[-2.0, 0.0], [1.0, 2.0]]])))
    np.testing.assert_array_equal(shown, [[0, 128], [191, 255]])
    assert opened(data_uri(np.full((1, 2, 2), 3.0))).tolist() == [[0, 0], [0, 0]], "of one brightness: no stretching"
    assert opened(data_uri(np.zeros((3, 400, 300)))).shape == (LARGEST, LARGEST * 3 // 4, 3)


def test_pictures_come_from_the_run_s_own_data(run):
    found = pictures(run.folder, ["train/3", "test/5", "train/99"])
    assert {name: int(opened(uri)[0, 0]) for name, uri in found.items()} == {"train/3": 60, "test/5": 100}


def test_without_its_data_a_run_has_no_pictures(run, data, caplog):
    images = dict(np.load(data["path"]))
    np.savez(data["path"], **{**images, "images": images["images"] + 1})
    assert pictures(run.folder, ["train/3"]) == {}, "other pixels under the same name"
    (run.folder / "run.json").write_text(json.dumps({"origin": {"config": {"data": {**data, "path": "gone.npz"}}}}))
    assert pictures(run.folder, ["train/3"]) == {}
    (run.folder / "run.json").unlink()
    assert pictures(run.folder, ["train/3"]) == {}


def test_rows_have_pictures_where_they_are_asked_for(run, make_outcome):
    rows = answer_rows(run, with_pictures=True)
    assert [(row.forget, row.question, row.truth) for row in rows] == [
        (True, "train/3", "<b>dog</b>"),
        (False, "train/4", "cat"),
    ]
    assert [int(opened(row.picture)[0, 0]) for row in rows] == [60, 80]
    assert [(row.before.right, row.after.right) for row in rows] == [(True, False), (False, True)]
    assert [row.picture for row in answer_rows(run)] == [None, None]
    assert {row.picture for row in answer_rows(make_outcome(), with_pictures=True)} == {None}, "questions have none"


class Images(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.found.append(dict(attrs))


def test_the_page_holds_the_images_and_fetches_none(run):
    text = render(report_data([run.folder.parent]))
    page = Images(text)
    assert [image["alt"] for image in page.found] == ["train/3: <b>dog</b>", "train/4: cat"]
    assert [int(opened(str(image["src"]))[0, 0]) for image in page.found] == [60, 80]
    assert "b" not in page.tags, "a class is only ever text"
    assert "✓ marks the true class; p is the probability the model gives it." in text
    assert "img-src data:" in text
