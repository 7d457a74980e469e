"""Forget requests over images: what is drawn, what is kept, what is measured."""

from __future__ import annotations

import numpy as np
import pytest

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import Classes, ImageRow
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Scenario, draw_request, eval_splits, held_out, training_rows
from llm_unlearn.data.tokenise import encode_answers, encode_rows, only_texts, resolve_format
from llm_unlearn.errors import UserError

CLASSES = ["cat", "dog", "owl", "fox"]


def image(split: str, i: int, n_sub: int = 2) -> ImageRow:
    name, sub = CLASSES[i % 4], (i // 4) % n_sub
    fact = f"{split}/{i}"
    facts = (fact, f"class:{name}", f"subclass:{name}.{sub}")
    pixels = np.full((1, 2, 2), i, dtype=np.float32)
    return ImageRow(fact, name, author=fact, relation="class", fact_id=fact, facts=facts, pixels=pixels)


@pytest.fixture
def pictures() -> Corpus:
    splits = {
        "train": tuple(image("train", i) for i in range(80)),
        "test": tuple(image("test", i) for i in range(40)),
    }
    return Corpus("pictures", "image", splits, {"classes": CLASSES, "shape": [1, 2, 2], "pixels": "0"})


def drawn(corpus: Corpus, **scenario):
    request = draw_request(corpus, Scenario(**scenario))
    return request, [corpus.split("train")[i] for i in request.forget]


def test_a_whole_class_goes_with_its_test_images(pictures):
    request, forget = drawn(pictures, kind="class", size=1)
    (gone,) = {row.answer for row in forget}
    assert len(forget) == 20
    assert gone not in {row.answer for row in training_rows(pictures, request, "forget")}
    splits = eval_splits(pictures, request)
    assert {row.answer for row in splits["holdout"]} == {gone}
    assert gone not in {row.answer for row in splits["test"]}
    assert splits["bystander"] == splits["test"]
    assert len(held_out(pictures)) == 40


def test_a_share_of_two_classes_leaves_their_test_images_to_be_asked(pictures):
    request, forget = drawn(pictures, kind="class", size=2, share=0.5)
    names = {row.answer for row in forget}
    assert len(forget) == 20
    assert len(names) == 2
    splits = eval_splits(pictures, request)
    assert len(splits["test"]) == 40
    assert {row.answer for row in splits["holdout"]} == names
    assert not names & {row.answer for row in splits["bystander"]}
    assert len(splits["retain"]) == 60


@pytest.mark.parametrize("scenario", [{"kind": "class", "size": 1}, {"kind": "class", "size": 2, "share": 0.5}])
def test_validation_images_are_parted_as_the_test_images_are(pictures, scenario):
    val = tuple(image("val", i) for i in range(40))
    more = Corpus("pictures", "image", {**pictures.splits, "val": val}, pictures.meta)
    request, _ = drawn(pictures, **scenario)
    plain, splits = eval_splits(pictures, request), eval_splits(more, request)
    assert {name: splits[name] for name in plain} == plain, "what is measured stays"
    for mine, name in (("val", "test"), ("val_holdout", "holdout")):
        assert [row.question for row in splits[mine]] == [row.question.replace("test/", "val/") for row in splits[name]]
    assert held_out(more) == val, "checkpoints are chosen by them"
    assert held_out(pictures) == pictures.split("test")


def test_named_classes_are_taken(pictures):
    _, forget = drawn(pictures, kind="class", classes=("owl",), share=0.25)
    assert {row.answer for row in forget} == {"owl"}
    assert len(forget) == 5


def test_a_subclass_is_part_of_one_class(pictures):
    request, forget = drawn(pictures, kind="subclass", size=1)
    assert len({row.facts[2] for row in forget}) == 1
    assert len(forget) == 10
    splits = eval_splits(pictures, request)
    assert {row.facts[2] for row in splits["holdout"]} == {forget[0].facts[2]}
    assert forget[0].facts[2] not in {row.facts[2] for row in splits["test"]}
    assert forget[0].answer in {row.answer for row in splits["test"]}


def test_random_images_have_no_bystanders(pictures):
    request, forget = drawn(pictures, kind="random", share=0.15)
    assert len(forget) == 12
    splits = eval_splits(pictures, request)
    assert "bystander" not in splits
    assert len(splits["holdout"]) == 40


@pytest.mark.parametrize("scenario", [{"kind": "random"}, {"kind": "class", "share": 0.5}])
def test_draws_of_a_seed_are_nested(pictures, scenario):
    share = scenario.get("share")
    small, large = ({**scenario, "size": 1, "seed": 3}, {**scenario, "size": 2, "seed": 3})
    few, many = (set(drawn(pictures, **values)[0].facts) for values in (small, large))
    assert few < many
    if share is None:
        assert drawn(pictures, kind="random", size=2, seed=4)[0].facts != frozenset(many)


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ({"kind": "author"}, "is for questions"),
        ({"kind": "class", "classes": ("cow",)}, "unknown class 'cow'"),
        ({"kind": "class", "size": 3}, "forget at most half"),
        ({"kind": "class", "size": 1, "share": 0.01}, "forget set is empty"),
        ({"kind": "class", "size": 1, "share": 0.99}, "leaves no images of class"),
        ({"kind": "random", "size": 60}, "forget at most half"),
        ({"kind": "subclass", "size": 9}, "forget at most half"),
    ],
)
def test_requests_that_cannot_be(pictures, scenario, problem):
    with pytest.raises(UserError, match=problem):
        drawn(pictures, **scenario)


def test_a_subclass_that_is_the_whole_class(pictures):
    one = {name: tuple(image(name, i, 1) for i in range(40)) for name in ("train", "test")}
    with pytest.raises(UserError, match="leaves no images of class"):
        drawn(Corpus("one", "image", one, pictures.meta), kind="subclass", size=1)


@pytest.mark.parametrize("scenario", [{"kind": "class"}, {"kind": "author", "share": 0.5}])
def test_questions_have_no_classes(tiny_world, scenario):
    with pytest.raises(UserError, match="are for images"):
        draw_request(tiny_world, Scenario(**scenario))


def test_images_are_answers_of_one_token(pictures, tmp_path):
    classes = Classes(CLASSES, (1, 2, 2))
    rows = pictures.split("train")[:3]
    batch = collate(encode_rows(classes, rows))
    assert batch.inputs.shape == (3, 1, 2, 2)
    assert batch.labels_N.tolist() == [0, 1, 2]
    assert batch.index_N.tolist() == batch.row_N.tolist() == [0, 1, 2]
    assert (batch.n_inputs, batch.n_rows, batch.n_tokens) == (3, 3, 3)
    assert encode_answers(classes, [(rows[0], "fox")])[0].label == 3
    with pytest.raises(UserError, match="unknown class 'cow'"):
        encode_answers(classes, [(rows[0], "cow")])
    classes.save_pretrained(tmp_path)
    assert Classes.load(tmp_path).names == tuple(CLASSES)
    assert Classes.load(tmp_path).shape == (1, 2, 2)


def test_text_is_no_image(tiny_world):
    with pytest.raises(UserError, match="is no image"):
        encode_rows(Classes(CLASSES, (1, 2, 2)), tiny_world.split("train")[:1])


def test_an_image_is_no_text(pictures, tiny_tokenizer, tiny_items):
    classes, rows = Classes(CLASSES, (1, 2, 2)), pictures.split("train")[:3]
    with pytest.raises(UserError, match="the model reads text, the data are images"):
        encode_rows(tiny_tokenizer, rows)
    with pytest.raises(UserError, match="texts are needed, and the data are images"):
        only_texts(encode_rows(classes, rows))
    assert all(a is b for a, b in zip(only_texts(tiny_items), tiny_items, strict=True))
    with pytest.raises(UserError, match="format=chat: images have no prompt"):
        resolve_format(classes, "chat")
    assert resolve_format(classes, "auto") == "bare"
