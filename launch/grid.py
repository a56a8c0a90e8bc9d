"""A grid of runs from the words of a command line: which options have several values, and what each point is called."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import reduce
from hashlib import sha256
from itertools import product
from typing import Any

from dinoreg.config import ConfigError
from launch.recipe import LaunchedRun

LONGEST = 60  # characters of one value in the name of a folder


@dataclass(frozen=True)
class Axis:
    """An option with several values, as typed."""

    key: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key} = {', '.join(self.values)}"


def split_axes(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes among `key=value` words, and the other words as they are. Raises ConfigError.

    Values are separated by commas. In an option that is a list itself commas belong to the list, so that there only
    several lists in brackets are an axis: `optim.betas=[0.9,0.95],[0.9,0.999]`. Commas in quotes separate nothing.
    """
    axes, rest = [], []
    for word in words:
        key, _, value = word.partition("=")
        key, parts = key.strip(), _parts(value)
        if len(parts) < 2 or key.startswith("launch.") or (_is_list(key) and not all(map(_in_brackets, parts))):
            rest.append(word)
        else:
            axes.append(_axis(key, parts))
    for number, axis in enumerate(axes):
        if any(axis.key == other.key for other in axes[:number]) or any(_key(word) == axis.key for word in rest):
            raise ConfigError("is given twice; give all of its values at once", key=axis.key)
    if not axes:
        raise ConfigError("no option has several values: give one, as in model.num_registers=0,1,2,4")
    return axes, rest


def _axis(key: str, values: list[str]) -> Axis:
    if key == "run_dir":
        raise ConfigError("is the folder of them all: each run has its own in there, so that it is no axis", key=key)
    if "" in values:
        raise ConfigError(f"one of its values is empty: {','.join(values)}", key=key)
    return Axis(key, tuple(values))


def points(axes: Sequence[Axis]) -> list[list[str]]:
    """All combinations as overrides, the last axis fastest."""
    return [[f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)] for values in _grid(axes)]


def _grid(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    return list(product(*(axis.values for axis in axes)))


def value_of(config: LaunchedRun, key: str) -> Any:
    """Of one option."""
    return reduce(getattr, key.split("."), config)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last word, or all of it where that word alone means two of them."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def name_of(config: LaunchedRun, axes: Sequence[Axis]) -> str:
    """A folder's name, the same however a value was typed: `num_registers=4,lr=0.001`."""
    names = short_names([axis.key for axis in axes])
    return ",".join(f"{names[axis.key]}={_safe(as_text(value_of(config, axis.key)))}" for axis in axes)


def as_text(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list | tuple) else str(value)


def _safe(text: str) -> str:
    """Where characters are lost, a few digits tell one value from another."""
    plain = re.sub(r"[^\w.+@-]+", "_", text).strip("_")[:LONGEST]
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:4]}"


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def _parts(value: str) -> list[str]:
    """Between the commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _in_brackets(part: str) -> bool:
    return part.startswith("[") and part.endswith("]")


def _is_list(key: str) -> bool:
    """Whether an option is a list or a tuple; not where there is no such option, which is said when it is read."""
    kind: Any = LaunchedRun
    for name in key.split("."):
        kind = typing.get_type_hints(kind).get(name) if is_dataclass(kind) else None
    members = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    return any(typing.get_origin(member) in (list, tuple) for member in members)
