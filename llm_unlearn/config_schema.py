"""What a config class allows: walking its fields, filling defaults, explaining what pydantic refused."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llm_unlearn.config_yaml import Place, Where, got, short
from llm_unlearn.errors import suggest

_WANTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "dict": "a section (key: value)",
    "model": "a section (key: value)",
    "none": "null",
    "path": "a path",
    "finite": "a finite number",
}


def with_defaults(cls: type[BaseModel], base: BaseModel | None, data: dict[str, Any]) -> dict[str, Any]:
    """Fill sections given in part from the field's default, so that `optim.lr=1` keeps the default's other values."""
    out = dict(data)
    for name, field in cls.model_fields.items():
        default = _default(field, base, name)
        if name in out:
            value = out[name]
            if isinstance(value, dict):
                member = _member(field, default, value)
                if member is not None:
                    same = default if isinstance(default, member) else None
                    key = field.discriminator
                    tag = {key: getattr(same, key)} if isinstance(key, str) and same is not None else {}
                    out[name] = with_defaults(member, same, {**tag, **value})
        elif base is not None and name in base.model_fields_set:
            out[name] = base.model_dump(mode="json", include={name})[name]
    return out


def _default(field: FieldInfo, base: BaseModel | None, name: str) -> Any:
    """The value a field has when nobody sets it; `...` when it must be set."""
    if base is not None:
        return getattr(base, name)
    if field.is_required() or field.default_factory_takes_validated_data:
        return ...
    return field.get_default(call_default_factory=True)


def _member(field: FieldInfo, default: Any, value: dict[str, Any]) -> type[BaseModel] | None:
    """The model class that `value` is meant for: the one with its tag, the default's, or the only one."""
    models = _models(field.annotation)
    if isinstance(field.discriminator, str):
        tag = value.get(field.discriminator, getattr(default, field.discriminator, None))
        return next((m for m in models if tag in get_args(m.model_fields[field.discriminator].annotation)), None)
    return models[0] if len(models) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Model classes a section of this type may be (not those inside lists or dicts)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for arg in get_args(annotation) for m in _models(arg)]
    return []


def explain(cls: type[BaseModel], data: Any, error: ValidationError, where: Where) -> list[str]:
    """Return one problem per place in the config, in words, with its line and the nearest known name."""
    by_place: dict[Place, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_place.setdefault(_place(cls, data, item), []).append(item)
    return [_explain_one(cls, data, place, items, where) for place, items in by_place.items()]


def _place(cls: type[BaseModel] | None, data: Any, item: Any) -> Place:
    """Turn pydantic's location, which also names union members, into the place in the file."""
    out: list[str | int] = []
    skip_tag = False
    loc = item["loc"]
    for i, part in enumerate(loc):
        if skip_tag:
            skip_tag = False
            continue
        field = cls.model_fields.get(str(part)) if cls is not None else None
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not inside and not (i == len(loc) - 1 and item["type"] == "missing"):
            continue
        out.append(part)
        if inside:
            data = data[part]
            skip_tag = field is not None and isinstance(field.discriminator, str)
            cls = _member(field, None, data) if field is not None and isinstance(data, dict) else None
    return tuple(out)


def _explain_one(cls: type[BaseModel], data: Any, place: Place, items: list[Any], where: Where) -> str:
    name = ".".join(map(str, place)) or "config"
    at = next((where[place[:n]] for n in range(len(place), 0, -1) if place[:n] in where), "")
    kinds = {item["type"] for item in items}
    first = items[0]
    if "extra_forbidden" in kinds:
        return f"unknown key '{name}'{at}{_suggest_key(cls, data, place)}"
    if "missing" in kinds:
        return f"missing key '{name}'{at}"
    if kinds == {"union_tag_not_found"}:
        return f"missing key '{name}.{str(first['ctx']['discriminator']).strip(chr(39))}'{at}"
    if kinds == {"value_error"} or kinds == {"assertion_error"}:
        return f"{name}{at}: {first['msg'].split(', ', 1)[-1]}"
    if kinds == {"union_tag_invalid"}:
        ctx = first["ctx"]
        known = re.findall(r"'([^']*)'", ctx["expected_tags"])
        key = str(ctx["discriminator"]).strip("'")
        at = where.get((*place, key), at)
        return f"{name}.{key}{at}: unknown value '{ctx['tag']}'{_comma(suggest(str(ctx['tag']), known))}"
    value = first["input"]
    choices = [c for i in items if i["type"] in ("literal_error", "enum") for c in re.findall(r"'([^']*)'", i["msg"])]
    if choices and isinstance(value, str) and kinds <= {"literal_error", "enum"}:
        return f"{name}{at}: unknown value '{short(str(value))}'{_comma(suggest(value, choices))}"
    wants = [_WANTED.get(i["type"].split("_")[0], "") for i in items if i["type"] not in ("literal_error", "enum")]
    if all(wants) and (wants or choices):
        wanted = [*dict.fromkeys(wants), *(repr(c) for c in choices)]
        return f"{name}{at}: want {' or '.join(wanted)}, got {got(value)}{_hint(wants, value)}"
    text = (
        first["msg"]
        .replace("Input should be", "must be")
        .replace("Tuple should", "list should")
        .replace(" after validation", "")
    )
    return f"{name}{at}: {text[0].lower()}{text[1:]}, got {got(value)}"


def _suggest_key(cls: type[BaseModel], data: Any, place: Place) -> str:
    section, bad = ".".join(map(str, place[:-1])), str(place[-1])
    known: dict[str, None] = {}  # in the order of declaration, which breaks ties
    for path, *_ in walk_fields(cls, data=data):
        parts = path.split(".")
        known.update(dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts))))
    siblings = {k for k in known if k.rpartition(".")[0] == section}

    def likeness(key: str) -> float:
        leaf = difflib.SequenceMatcher(None, bad, key.rpartition(".")[2]).ratio()
        return leaf + 0.05 * (key in siblings)

    best = max(known, key=likeness, default="")
    if best and likeness(best) >= 0.7:
        return f", did you mean {best}?"
    return f", known: {', '.join(sorted(siblings))}" if siblings else ""


def _comma(suggestion: str) -> str:
    return ", " + suggestion.removeprefix("; ")  # "; " separates problems


def _hint(wants: Sequence[str], value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and "a whole number" in wants:
        return f", write {int(value)}"
    if isinstance(value, str) and set(wants) & {"a number", "a whole number"} and re.fullmatch(r"[-+.\deE_]+", value):
        return ", remove the quotes"
    return ", write true or false" if value in ("yes", "no", "on", "off") and "true or false" in wants else ""


def walk_fields(
    cls: type[BaseModel], base: BaseModel | None = None, prefix: str = "", data: Any = None, only_if: str = ""
) -> Iterator[tuple[str, FieldInfo, Any, str]]:
    """Yield (dotted key, field, default or `...`, condition) of every field, sections opened.

    `base` holds the defaults when the section has a default of its own; `data` picks the members of unions it shows.
    """
    for name, field in cls.model_fields.items():
        default = _default(field, base, name)
        models = _models(field.annotation)
        given = data.get(name) if isinstance(data, dict) else None
        if isinstance(given, dict) and (picked := _member(field, default, given)) is not None:
            models = [picked]
        if not models or default is None:
            yield prefix + name, field, default, only_if
        for model in models:
            same = default if isinstance(default, model) else None
            tag = _tag_of(field, model) if len(models) > 1 else ""
            condition = f"  (if {prefix}{name}.{tag})" if tag else only_if
            yield from walk_fields(model, same, f"{prefix}{name}.", given, condition)


def _tag_of(field: FieldInfo, model: type[BaseModel]) -> str:
    if not isinstance(field.discriminator, str):
        return ""
    return f"{field.discriminator}={'|'.join(map(str, get_args(model.model_fields[field.discriminator].annotation)))}"


def type_name(annotation: Any) -> str:
    """Name a type in words for the help: `number`, `text | null`, `a | b` for choices, `list of text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(type_name, args)))
    if isinstance(origin or annotation, type) and issubclass(origin or annotation, (BaseModel, Mapping)):
        return "section"
    if args:
        return f"list of {', '.join(dict.fromkeys(type_name(a) for a in args if a is not ...))}"
    names = {float: "number", int: "whole number", bool: "true/false", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
