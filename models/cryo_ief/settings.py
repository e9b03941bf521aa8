"""Training configurations: a parsed YAML document becomes frozen dataclasses, or one error that names the key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def read_document(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raise `ValueError` where the file is not one."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"{path}: not a readable YAML file ({error})"
        raise ValueError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path}: holds a {type(values).__name__}, a configuration is a mapping"
        raise ValueError(msg)  # noqa: TRY004 - the file's content is a value here
    return values


def parse_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass (nested ones too) from plain values; every fault is in the one `ValueError`."""
    faults = list(_unknown_keys(cls, values, ""))
    if not faults:
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            faults = [_describe(dict(fault)) for fault in error.errors()]
    raise ValueError("; ".join(faults))


def split_document(document: Mapping[str, Any], classes: tuple[type[Any], ...]) -> list[dict[str, Any]]:
    """Share a flat document's keys out among several dataclasses; raise naming a key that none of them has."""
    known = [{f.name for f in fields(cls)} for cls in classes]
    everything = set().union(*known)
    faults = [unknown_key(str(key), everything) for key in document if key not in everything]
    if faults:
        raise ValueError("; ".join(faults))
    return [{key: value for key, value in document.items() if key in names} for names in known]


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the sentence about a key that nobody reads, with the nearest known one or all of them."""
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"unknown key {key}, " + (f"did you mean {close[0]}?" if close else f"known are {sorted(known)}")


def _unknown_keys(cls: Any, values: Any, where: str) -> Iterable[str]:  # noqa: ANN401 - whatever YAML holds
    if not is_dataclass(cls) or not isinstance(values, Mapping):
        return
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        place = f"{where}{key}"
        if key not in hints:
            yield unknown_key(place, hints)
            continue
        inner = [hints[key], *typing.get_args(hints[key])]
        nested = next((kind for kind in inner if is_dataclass(kind)), None)
        items = enumerate(value) if isinstance(value, list | tuple) else ((None, value),)
        for index, item in items:
            yield from _unknown_keys(nested, item, f"{place}." if index is None else f"{place}.{index}.")


def _describe(fault: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{key}: missing"
    if fault["type"] == "value_error":  # the dataclass's own check, which names its key
        return str(fault["msg"]).removeprefix("Value error, ")
    return f"{key}: {fault['input']!r}, {fault['msg'][:1].lower()}{fault['msg'][1:]}"
