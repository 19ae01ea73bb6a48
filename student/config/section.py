"""Sections of a configuration validate themselves when built; and the way to JSON, back, and from a command line.

Two sections that stand for one another (a ViT or a Swin, one loss or another) carry a `kind`, and JSON names it.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import types
import typing
from typing import ClassVar, Literal

from ..errors import ConfigError
from .later import ADDED_LATER

LARGEST = {
    "image_size": 4096, "patch_size": 4096, "strides": 4096, "dim": 16384, "dims": 16384, "embed_dim": 16384, "depth": 512,
    "depths": 512, "heads": 1024, "mlp_ratio": 64, "levels": 512, "hidden_dim": 2**17, "out_dim": 16384, "queue": 2**22,
    "min_block": 2**20, "unit": 4096,
    "weight": 1e6, "base_lr": 1e3, "epochs": 10**6, "batch_size": 2**20,
}  # fmt: skip
"""Far above anything that is trained: a slip of the keyboard or a stranger's file must not ask for all the memory there is."""


class Section:
    """A section of a configuration: the types of its fields are validated when it is built, then `validate` says the rest."""

    def __post_init__(self) -> None:
        for name, hint in _field_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ConfigError(f"{type(self).__name__}.{name} must be {_words(hint)}, not {reprlib.repr(value)}.")
            for item in (value if isinstance(value, tuple) else (value,)) if name in LARGEST else ():
                require(
                    item <= LARGEST[name],
                    f"{type(self).__name__}.{name} must be at most {LARGEST[name]:g}, not {reprlib.repr(value)}.",
                )
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError where values of the right type make no sense."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(section: Section, where: str, *names: str) -> None:
    """Each of these fields, a number or numbers, must be above 0."""
    for name in names:
        value = getattr(section, name)
        values = value if isinstance(value, tuple) else (value,)
        require(bool(values) and all(item > 0 for item in values), f"{where}.{name} must be positive, not {value}.")


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(value):
    """The JSON value of a section; one that has a `kind` names it."""
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if "kind" not in _field_names(type(value)) and hasattr(value, "kind") else {}
        return kind | {name: to_json(getattr(value, name)) for name in _field_names(type(value))}
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


def from_json(value, hint, where: str):
    """Rebuild what `hint` describes; the types of plain values are validated by the section they end up in."""
    if kinds := _kinds(hint):
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ConfigError(f"{where}.kind must be one of {', '.join(kinds)}, not {reprlib.repr(kind)}.")
        return from_json({key: item for key, item in value.items() if key != "kind"}, kinds[kind], where)

    if dataclasses.is_dataclass(hint):
        names = _field_names(hint)
        if not isinstance(value, dict) or set(value) != set(names):
            given = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else reprlib.repr(value)
            raise ConfigError(f"{where} must have exactly the keys {', '.join(names)}; given: {given}.")
        hints = typing.get_type_hints(hint)
        return hint(**{name: from_json(value[name], hints[name], f"{where}.{name}") for name in names})

    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item_hint = typing.get_args(hint)[0]
        return tuple(from_json(item, item_hint, f"{where}.{index}") for index, item in enumerate(value))
    return value


def completed(value, hint):
    """`value`, JSON from a record that may be older than some fields of `hint`, with ADDED_LATER for those it lacks.

    Nothing is validated, and what is no part of `hint` stays as it is.
    """
    if kinds := _kinds(hint):
        kind = value.get("kind") if isinstance(value, dict) else None
        hint = kinds.get(kind) if isinstance(kind, str) else None
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        return _added_later(hint) | {key: completed(item, hints.get(key)) for key, item in value.items()}
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [completed(item, typing.get_args(hint)[0]) for item in value]
    return value


def _added_later(cls) -> dict[str, object]:
    """Field -> the JSON value that a record without it means; of those fields of `cls` that came later."""
    names = {name: f"{cls.__name__}.{name}" for name in _field_names(cls)}
    return {name: ADDED_LATER[key] for name, key in names.items() if key in ADDED_LATER}


def _field_names(cls) -> list[str]:
    return [member.name for member in dataclasses.fields(cls)]


def _field_hints(cls) -> dict[str, object]:
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if typing.get_origin(hint) is not ClassVar}


def _kinds(hint) -> dict[str, type]:
    """kind -> class for a union of sections that stand for one another; empty for any other type."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()
    return {cls.kind: cls for cls in members} if members and all(map(dataclasses.is_dataclass, members)) else {}


# --- types of fields ----------------------------------------------------------------------------------------------


def _fits(value, hint) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        hints = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_fits, value, hints))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint) -> str:
    """What a field wants, for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _kinds(hint):
        return "one of " + ", ".join(_kinds(hint))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple and _kinds(args[0]):
        return f"a list of {', '.join(_kinds(args[0]))}"
    if origin is tuple:
        return f"values like a,b,c (each {_words(args[0])})" if args[-1] is Ellipsis else f"{len(args)} numbers"
    plain = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
    return plain.get(hint, f"a {getattr(hint, '__name__', hint)}")


# --- text from a command line -------------------------------------------------------------------------------------


def parse(text: str, hint, name: str):
    """The JSON value that `text` means for a field of type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        inner = next(arg for arg in args if arg is not type(None))
        return None if text.lower() == "none" else parse(text, inner, name)
    if origin is tuple:
        return [parse(item.strip(), args[0], name) for item in text.split(",")] if text.strip() else []
    if hint is str or origin is Literal:
        return text
    try:
        return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={text[:80]} must be {_words(hint)}.") from error


def leaf_hints(section, prefix: str = "") -> dict[str, object]:
    """Dotted name -> type of every field that holds a plain value; sections in a tuple are numbered."""
    hints = {}
    for name, hint in _field_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            hints |= leaf_hints(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for index, item in enumerate(value):
                hints |= leaf_hints(item, f"{prefix}{name}.{index}.")
        else:
            hints[prefix + name] = hint
    return hints


def later_values(section) -> dict[str, object]:
    """Dotted name -> ADDED_LATER's value for every such field in `section`; sections in a tuple are numbered."""
    values = {}
    for name in leaf_hints(section):
        *parents, leaf = name.split(".")
        owner = section
        for parent in parents:
            owner = owner[int(parent)] if isinstance(owner, tuple) else getattr(owner, parent)
        added = _added_later(type(owner))
        values |= {name: added[leaf]} if leaf in added else {}
    return values
