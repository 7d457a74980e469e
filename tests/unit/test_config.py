"""Configs: every problem in one line, with line and nearest name; what is dumped is read back equal."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from llm_unlearn.config import Config, build_config, describe, digest, dump_config, flatten, load_config, parse_cli
from llm_unlearn.errors import UserError


class Optim(Config):
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(1.0, description="Decoupled.")
    betas: tuple[float, float] = (0.9, 0.98)


class World(Config):
    kind: Literal["world"] = "world"
    n_authors: int = 40
    preset: Literal["short", "default"] = "default"


class Tofu(Config):
    kind: Literal["tofu"] = "tofu"
    folder: Path | None = None


class Run(Config):
    method: Literal["npo", "simnpo", "ga"] = "npo"
    optim: Optim = Optim(lr=5e-4)
    data: Annotated[World | Tofu, Field(discriminator="kind")] = World(n_authors=10)
    extra: Optim | None = None
    params: dict[str, Any] = {}
    steps: int | Literal["auto"] = "auto"
    limit: float = Field(math.inf, allow_inf_nan=True)
    verbose: bool = False
    out: Path = Path("runs")
    parts: tuple[Optim, ...] = ()


class Needed(Config):
    out: Path


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(Run, path, overrides)


def problem(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *overrides)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message.replace(str(tmp_path) + "/", "")


def test_yaml_1_2_scalars(tmp_path):
    config = load(tmp_path, "optim: {lr: 1e-3, betas: [0.5, 1]}\nout: no\nsteps: 012\n")
    assert config.optim.lr == 1e-3
    assert config.optim.betas == (0.5, 1.0)
    assert config.out == Path("no")
    assert config.steps == 12


def test_empty_file_and_no_file_are_the_defaults(tmp_path):
    assert load(tmp_path, "") == load(tmp_path, "# nothing\n") == load_config(Run, None) == Run()


def test_all_problems_at_once_in_one_line(tmp_path):
    text = "method: nop\noptim:\n  lr: '1e-3'\n  weigth_decay: 1\nsteps: 1e3\nverbose: yes\n"
    message = problem(tmp_path, text, "out.x=1", "parts=3")
    assert message == (
        "bad config (run.yaml): method (line 1): unknown value 'nop', did you mean 'npo'?; "
        "optim.lr (line 3): want a number, got '1e-3' (text), remove the quotes; "
        "unknown key 'optim.weigth_decay' (line 4), did you mean optim.weight_decay?; "
        "steps (line 5): want a whole number or 'auto', got 1000.0 (number), write 1000; "
        "verbose (line 6): want true or false, got 'yes' (text), write true or false; "
        "out (command line): want text, got {'x': 1} (section); "
        "parts (command line): want a list, got 3 (whole number)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight_decay: 3", "unknown key 'weight_decay' (line 1), did you mean optim.weight_decay?"),
        ("n_author: 3", "did you mean data.n_authors?"),
        ("optimm: {}", "did you mean optim?"),
        ("extra: {weigth_decay: 1}", "unknown key 'extra.weigth_decay' (line 1), did you mean extra.weight_decay?"),
        ("parts: [{lr: 1}, {lrr: 2}]", "unknown key 'parts.1.lrr' (line 1), did you mean optim.lr?"),
        ("data: {kind: tofo}", "data.kind (line 1): unknown value 'tofo', did you mean 'tofu'?"),
        ("data: {preset: shor}", "data.preset (line 1): unknown value 'shor', did you mean 'short'?"),
        ("data: {n_authors: true}", "data.n_authors (line 1): want a whole number, got true (true/false)"),
        ("data: 3", "data (line 1): "),
        ("zzz: 1", "unknown key 'zzz' (line 1), known: data, extra, limit, method, optim, out, params"),
        ("optim: {lr: -1}", "optim.lr (line 1): must be greater than 0, got -1"),
        ("optim: {lr: 0}", "must be greater than 0"),
        ("optim: {lr: .nan}", "optim.lr (line 1): want a finite number, got nan (number)"),
        ("optim: {betas: [1, .inf]}", "optim.betas.1 (line 1): want a finite number, got inf"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas (line 1): list should have at most 2 items"),
        ("params: {a: [.inf]}", "params holds inf; only finite numbers"),
        ("optim: null", "optim (line 1): want a section (key: value), got null"),
        ("a: 1\na: 2\nb: {c: 1, c: 2}", "key 'a' twice (lines 1, 2); key 'b.c' twice (lines 3, 3)"),
        ("1: 2", "unknown key '1' (line 1)"),
    ],
)
def test_message(tmp_path, text, expected):
    assert expected in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x 1\nb: *x", "run.yaml:1: invalid YAML: aliases (*name) are not supported"),
        ("a: &x [*x]", "aliases (*name) are not supported"),
        ("a: [1", "run.yaml:1: invalid YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "run.yaml:2: invalid YAML"),
        ("out: !!python/object:os.system x", "could not determine a constructor"),
        ("[1, 2]", "the file must hold key: value lines, not [1, 2] (list)"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("a: " + "[" * 3000, "nested more than 50 deep"),
    ],
)
def test_not_our_yaml(tmp_path, text, expected):
    assert expected in problem(tmp_path, text)


def test_unreadable_files(tmp_path):
    big, latin = tmp_path / "big.yaml", tmp_path / "latin.yaml"
    big.write_text("#" * 1_000_001)
    latin.write_bytes(b"method: npo\nout: caf\xe9\n")
    for path, expected in (
        (big, "larger than 1,000,000 bytes"),
        (latin, ":2: not UTF-8 (byte 0xe9)"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "no such file"),
    ):
        with pytest.raises(UserError, match="(?s).*") as error:
            load_config(Run, path)
        assert expected in str(error.value)
        assert str(path) in str(error.value)


def test_overrides_win_nest_and_are_yaml(tmp_path):
    config = load(
        tmp_path,
        "optim: {lr: 1}\nextra: null\n",
        *(
            "optim.lr=2e-4",
            "extra.lr=3",
            "extra.betas=[0, 1]",
            "params.a.b='7'",
            "steps=5",
            "data={kind: tofu}",
            "out=#1",
        ),
    )
    assert config.optim.lr == 2e-4
    assert config.extra == Optim(lr=3.0, betas=(0.0, 1.0))
    assert config.params == {"a": {"b": "7"}}
    assert config.steps == 5
    assert config.data == Tofu()
    assert config.out == Path("#1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr' (command line), did you mean optim.lr?"),
        ("learning_rate", "must look like key=value"),
        ("a b=1", "must look like key=value"),
        ("out=", "has no value; write out=null or out=''"),
        ("out=[1", "override 'out=[1': expected ',' or ']'"),
        ("out=*.json", "quote text with special characters"),
        ("method.x=1", "method is 'ga' (text), not a section"),
        ("optim.lr=nan", "want a number, got 'nan' (text)"),
    ],
)
def test_bad_override(tmp_path, override, expected):
    assert expected in problem(tmp_path, "method: ga\n", override)


def test_a_section_given_in_part_keeps_the_default_of_the_field(tmp_path):
    config = load(tmp_path, "optim: {weight_decay: 0}\ndata: {preset: short}\n")
    assert config.optim == Optim(lr=5e-4, weight_decay=0.0)
    assert config.data == World(n_authors=10, preset="short")
    assert load(tmp_path, "data: {kind: world}").data == World(n_authors=10)
    assert load(tmp_path, "data: {kind: tofu, folder: x}").data == Tofu(folder=Path("x"))


def test_missing_key_and_built_from_a_dict():
    with pytest.raises(UserError, match=r"^bad config \(command line\): missing key 'out'$"):
        load_config(Needed, None)
    assert build_config(Needed, {"out": "x"}).out == Path("x")
    with pytest.raises(UserError, match="cell 3.*unknown key 'ou', did you mean out"):
        build_config(Needed, {"ou": "x"}, "cell 3")


def test_configs_are_frozen_and_strict_in_python():
    config = Optim()
    with pytest.raises(ValidationError):
        config.lr = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    for bad in ({"lr": "1"}, {"lr": True}, {"lr": math.nan}, {"lrr": 1.0}):
        with pytest.raises(ValidationError):
            Optim(**bad)


def test_parse_cli(capsys):
    assert parse_cli(["--config", "a.yaml", "a.b=1", "c=2"]) == (Path("a.yaml"), ["a.b=1", "c=2"])
    assert parse_cli(["c=x=y", "--config=b.yaml"]) == (Path("b.yaml"), ["c=x=y"])
    assert parse_cli([]) == (None, [])
    for argv, expected in (
        (["--lr", "3"], "unknown argument '--lr'; write lr=VALUE"),
        (["--optim.lr=3"], "write optim.lr=3"),
        (["--config"], "--config needs a file"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
    ):
        with pytest.raises(UserError) as error:
            parse_cli(argv)
        assert expected in str(error.value)
    with pytest.raises(SystemExit) as stop:
        parse_cli(["--help"], Run)
    assert stop.value.code == 0
    assert "optim.lr  number = 0.0005\n    Peak learning rate.\n" in capsys.readouterr().out


def test_describe_names_every_field_with_default_and_condition():
    text = describe(Run)
    for line in (
        'method  npo | simnpo | ga = "npo"',
        "data.n_authors  whole number = 10  (if data.kind=world)",
        "data.folder  path | null = null  (if data.kind=tofu)",
        "extra  section | null = null",
        "steps  whole number | auto",
        'out  path = "runs"',
    ):
        assert line in text
    assert describe(Needed) == "out  path (required)\n"


def test_digest_is_canonical():
    assert digest({"b": 1.0, "a": [1, None]}) == digest({"a": (1, None), "b": 1.0})
    assert digest(Optim()) == digest(Optim().model_dump(mode="json")) == digest(load_config(Run, None).parts or Optim())
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert digest({"a": 0.1}) != digest({"a": 0.1 + 1e-17 * 2})
    assert digest({"a": np.float64(0.5), "p": Path("x")}) == digest({"a": 0.5, "p": "x"})
    with pytest.raises(TypeError, match="has no plain form"):
        digest({"a": object()})


def test_digest_does_not_depend_on_the_process():
    code = "from llm_unlearn.config import digest; print(digest({'s': {'b', 'a', 'c'}, 'x': 0.1}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert seen == {digest({"s": ["a", "b", "c"], "x": 0.1}) + "\n"}


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OPTIMS = st.builds(Optim, lr=FINITE.filter(lambda x: x > 0), weight_decay=FINITE, betas=st.tuples(FINITE, FINITE))


@settings(max_examples=150, deadline=None)
@given(
    config=st.builds(
        Run,
        optim=OPTIMS,
        data=st.builds(World, n_authors=st.integers()) | st.builds(Tofu),
        extra=st.none() | OPTIMS,
        params=st.dictionaries(TEXT, PLAIN, max_size=4),
        steps=st.integers() | st.just("auto"),
        limit=st.floats(allow_nan=False),
        parts=st.lists(OPTIMS, max_size=2).map(tuple),
    )
)
def test_dump_is_read_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_config(config, path)
    back = load_config(Run, path)
    assert back == config
    assert digest(back) == digest(config)
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_flatten_gives_dotted_keys_and_leaves_lists_alone():
    assert flatten({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": None}) == {"a.b.c": 1, "a.d": [{"e": 2}], "f": None}
    assert flatten({"a": {}}) == {}, "an empty section holds nothing"


def test_a_list_that_is_too_short_names_what_is_missing():
    class Pair(Config):
        pair: tuple[float, float] = (0.0, 1.0)

    with pytest.raises(UserError, match=r"missing key 'pair\.1'"):
        build_config(Pair, {"pair": [0.5]})
