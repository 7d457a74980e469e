"""A model's probes.json: what it holds, when it is kept, what is refused; the table on images; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from llm_unlearn.cli import app
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Request, Scenario, draw_request
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.cka import cka
from llm_unlearn.eval.probes.passes import features
from llm_unlearn.eval.probes.run import probe_model
from llm_unlearn.eval.probes.table import PROBES, Settings, Subject, choose
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.pretrained import load_model, load_tokenizer
from llm_unlearn.models.tiny import SIZES, build_tiny
from llm_unlearn.report.tables import probes_table
from llm_unlearn.train.snapshot import save_model

FEW = Settings(items=16, draws=3)


@pytest.fixture(scope="module")
def case(tiny_world):
    return tiny_world, draw_request(tiny_world, Scenario(size=2))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    runs = tmp_path_factory.mktemp("runs")
    out = {}
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        lm = build_tiny(SIZES["nano"], len(tiny_tokenizer), tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id)
        origin = {"kind": "grok", "config": {"data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2}}}
        out[name] = str(save_model(runs / name, lm, tiny_tokenizer, origin))
    return out


@pytest.fixture(scope="module")
def result(models, case):
    return probe_model(models["model"], *case, against=models["other"], settings=FEW)


def test_every_probe_leaves_numbers_with_their_cost(result, models):
    folder = Path(result["folder"])
    assert folder.parent == Path(models["model"]).parent, "beside the model's evaluations"
    on_disk = json.loads((folder / "probes.json").read_text())
    assert list(on_disk["probes"]) == list(PROBES) == result["ran"]
    for name, found in on_disk["probes"].items():
        assert found["lines"], name
        assert found["formula"] == PROBES[name].formula
        assert found["cost"]["cpu_seconds"] >= 0
        assert all(isinstance(line["value"], float | int) for line in found["lines"]), name
    assert on_disk["sets"] == {"forget": 20, "retain": 228, "held_out": 16}
    assert on_disk["identity"]["settings"]["items"] == 16
    assert list(on_disk["probes"]["cka"]["detail"]["layers"]) == ["0", "1"]
    nulls = [line["null"] for line in on_disk["probes"]["alignment"]["lines"] if "cos(forget" in line["name"]]
    assert len(nulls) == 4
    assert all(low <= high for low, high in nulls)


def test_numbers_are_those_of_the_functions(result, models, case):
    corpus, request = case
    tokenizer = load_tokenizer(models["model"])
    from llm_unlearn.data.tokenise import encode_rows

    items = encode_rows(tokenizer, [corpus.split("train")[i] for i in request.forget])
    pair = []
    for name in ("model", "other"):
        model = AnswerModel(load_model(models[name]))
        pair.append(features(model, items, 1))
    told = {line["name"]: line["value"] for line in result["probes"]["cka"]["lines"]}
    assert told["layer 1: forget, against"] == pytest.approx(cka(*(f[_drawn(20)] for f in pair)), rel=1e-6)


def _drawn(n):
    subject = Subject(None, {"forget": list(range(n))}, {})  # pyright: ignore
    return subject.few("forget", FEW.items, FEW.seed)


def test_a_seed_gives_the_same_numbers_again(result, models, case, tmp_path):
    again = probe_model(
        models["model"], *case, against=models["other"], settings=FEW, which=["alignment", "cka"], out=tmp_path / "o"
    )
    for name in ("alignment", "cka"):
        for mine, theirs in zip(again["probes"][name]["lines"], result["probes"][name]["lines"], strict=True):
            assert mine["value"] == pytest.approx(theirs["value"], rel=1e-5, abs=1e-7)


def test_probes_run_before_stay_and_other_settings_have_a_folder_of_their_own(models, case, tmp_path):
    first = probe_model(models["model"], *case, which=["norms"], settings=FEW)
    second = probe_model(models["model"], *case, which=["logits"], settings=FEW)
    assert first["folder"] == second["folder"]
    assert set(second["probes"]) == {"norms", "logits"}
    assert second["ran"] == ["logits"]
    third = probe_model(models["model"], *case, which=["norms"], settings=Settings(items=16, draws=3, seed=1))
    assert third["folder"] != first["folder"]
    with pytest.raises(UserError, match="another model, data or settings; choose another --out"):
        probe_model(models["model"], *case, which=["norms"], settings=Settings(items=17), out=Path(first["folder"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"which": ["aligment"]}, r"unknown probe 'aligment' in --which; did you mean 'alignment'\?"),
        ({"settings": Settings(layer=2)}, "layer 2: the model has layers 0 to 1; give one of them"),
        ({"settings": Settings(layer=-1), "which": ["cka"]}, "layer -1: the model has layers 0 to 1"),
        ({"settings": Settings(items=3)}, "--items 3: probes need at least 8 rows"),
        ({"settings": Settings(loss=-1.0)}, "--loss -1: a mean loss is above 0"),
        ({"settings": Settings(items=8, loss=99.0), "which": ["hessian"]}, "no temperature gives a mean loss of 99"),
        ({"settings": Settings(items=8, radius=0.0), "which": ["local_complexity"]}, "radius must be > 0"),
    ],
)
def test_bad_use_is_one_line_and_nothing_is_written(models, case, tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as told:
        probe_model(models["model"], *case, out=tmp_path / "p", **changes)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "p").exists()


def test_an_empty_forget_set_is_told(models, case, tmp_path):
    nothing = Request(Scenario(), frozenset(), (), (), tuple(range(10)))
    with pytest.raises(UserError, match="the forget set is empty; give data"):
        probe_model(models["model"], case[0], nothing, out=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_folder_of_something_else_is_left_alone(models, case, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds something else than probes"):
        probe_model(models["model"], *case, which=["norms"], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_table_shows_values_and_nulls(result):
    table = probes_table(result)
    lines = sum(len(result["probes"][name]["lines"]) for name in result["ran"])
    assert table.row_count == lines
    assert list(table.columns[0].cells)[0] == "alignment"


# ------------------------------------------------------------------------------------------------ images
@pytest.fixture
def images(fake_images, pictures, picture_rows):
    torch.manual_seed(0)
    net = fake_images(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 9), nn.GELU(),
                      nn.Linear(9, 3))  # fmt: skip
    items = {name: pictures(n, seed) for name, n, seed in (("forget", 12, 0), ("retain", 40, 1), ("held_out", 10, 2))}
    return Subject(net, {name: picture_rows(some, name) for name, some in items.items()}, items)


@pytest.mark.parametrize("name", [name for name in PROBES if name != "bridge"])
def test_every_probe_reads_an_image_model(images, name):
    found = PROBES[name].fn(images, FEW)
    assert found.lines
    assert all(math.isfinite(line.value) for line in found.lines), found.lines


def test_images_have_no_bridge(images):
    with pytest.raises(UserError, match="bridge: wants the two-hop questions of a world") as told:
        PROBES["bridge"].fn(images, FEW)
    assert "\n" not in str(told.value)


def test_a_forgotten_class_has_no_partner_of_its_class(images, fake_images):
    keep = {name: [i for i, row in enumerate(rows) if (row.answer == "c0") == (name == "forget")]
            for name, rows in images.rows.items()}  # fmt: skip
    rows = {name: [images.rows[name][i] for i in numbers] for name, numbers in keep.items()}
    items = {name: [images.items[name][i] for i in numbers] for name, numbers in keep.items()}
    subject = Subject(images.model, rows, items)
    with pytest.raises(UserError, match="cka: 0 forget rows have a retain row of their class"):
        PROBES["cka"].fn(subject, FEW)
    found = PROBES["alignment"].fn(subject, FEW)
    assert found.detail["matched"] == 0
    excess = [line.value for line in found.lines if "excess" in line.name]
    assert excess == [None] * 4, "classes of their own are no null for it"
    assert "0 % of the rows compared are of a class or wording" in found.detail["no_excess"]
    assert all(line.value is not None for line in found.lines if "excess" not in line.name)
    subject.other = images.model
    same = [line for line in PROBES["cka"].fn(subject, FEW).lines if "against" in line.name]
    assert same
    assert all(line.value == pytest.approx(1) for line in same), "against itself"


def test_a_value_that_cannot_be_had_is_a_dash():
    lines = [{"name": "ce: excess", "value": None, "null": None}]
    table = probes_table({"model": "m", "ran": ["p"], "probes": {"p": {"lines": lines, "cost": {"cpu_seconds": 1.0}}}})
    assert list(table.columns[2].cells) == ["–"]


def test_what_does_not_apply_is_left_out_unless_asked_for(models, case, monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise UserError("there is no such thing here")

    from llm_unlearn.eval.probes import table

    monkeypatch.setattr(table, "local_complexity", refuse)
    found = probe_model(models["model"], *case, settings=FEW, out=tmp_path / "p")
    assert found["ran"] == [name for name in PROBES if name != "local_complexity"]
    with pytest.raises(UserError, match="no such thing"):
        probe_model(models["model"], *case, settings=FEW, which=["local_complexity"], out=tmp_path / "q")


def test_every_probe_says_what_it_is():
    for name, probe in PROBES.items():
        assert probe.name == name
        assert all((probe.formula, probe.source, probe.cost, probe.help)), name
    assert choose(None) == list(PROBES.values())
    assert [probe.name for probe in choose(["norms", "cka"])] == ["cka", "norms"]


# ------------------------------------------------------------------------------------------------ command
def test_the_command_finds_the_model_s_own_data(models, tmp_path):
    done = CliRunner().invoke(
        app,
        ["probe", models["model"], "--which", "norms,logits", "--items", "16", "--out", str(tmp_path / "p"), "--json"],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["ran"] == ["norms", "logits"]
    assert json.loads((tmp_path / "p" / "probes.json").read_text())["sets"]["forget"] == 20
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["probe", models["model"], "--which", "norms", "--items", "16", "--out", str(tmp_path / "p")]
    )
    assert "all: norm" in shown.stdout
    assert "probes.json" in shown.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--which", "hesian"], "did you mean 'hessian'"),
        (["--which", " , "], "--which: no probe named"),
        (["--layer", "9", "--which", "ranks"], "layer 9: the model has layers 0 to 1"),
    ],
)
def test_the_command_tells_mistakes(models, argv, says):
    done = CliRunner().invoke(app, ["probe", models["model"], *argv])
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)


def test_given_splits_ask_for_nothing(models, tmp_path):
    corpus = Corpus("muse", "muse", {"forget": ()}, {})
    nothing = draw_request(corpus, Scenario()) if corpus.given else Request(Scenario(), frozenset(), (), (), ())
    with pytest.raises(UserError, match="forget set is empty"):
        probe_model(models["model"], corpus, nothing, out=tmp_path / "p")
