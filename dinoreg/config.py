"""Load, merge and validate: defaults of a schema, then a recipe and its bases, then the command line.

A schema is a dataclass of dataclasses, each living beside the code that reads it. Whatever is wrong with a
configuration becomes one `ConfigError` of one line: the key, what is wrong with it, and where it was written.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

COMMAND_LINE = "the command line"
OTHERS = ("launch",)  # sections of a recipe that are for programs around the run
LONGEST = 120  # characters of a mistake that are shown again
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "merge", "value")}
MAX_NODES = 100_000  # of a recipe with its aliases written out; a page of nested ones would be a thousand million


class ConfigError(ValueError):
    """A mistake in a configuration, told in one line. `key` is dotted; inside a part's `check()` its own field."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.message = message
        self.key = key


@dataclass(frozen=True)
class _Setting:
    """One option as somebody wrote it."""

    key: str
    node: yaml.Node
    origin: str


def load(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """An instance of `schema` from its defaults, the recipe at `path` (a file or a name in configs/) and `key=value`s.

    Raises ConfigError on anything that is not as it should be. Each nested dataclass with a `check()` is asked too,
    parts before the whole, so that a check may rely on its parts.
    """
    kinds = dict(_leaves(schema))
    settings = list(_read_recipe(find_recipe(path), kinds)) if path is not None else []
    settings += [_read_override(text, kinds) for text in overrides]
    config = OmegaConf.structured(schema)
    origins: dict[str, str] = {}
    for setting in settings:
        _apply(config, setting, kinds)
        origins[setting.key] = setting.origin
    try:
        result = typing.cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise _located(_first_line(error), error.full_key or "", origins) from None
    try:
        _check(result)
    except ConfigError as error:
        raise _located(error.message, error.key, origins) from None
    return result


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that `load` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means: itself, with .yaml added, or the recipe of that name shipped with dinoreg."""
    given = Path(path)
    for candidate in (given, Path(f"{given}.yaml"), *(_shipped(given.name))):
        if candidate.is_file():
            return candidate
    known = list(recipes())
    nearest = f"; the nearest recipe is {_nearest(given.stem, known)}" if known else ""
    raise ConfigError(f"no recipe '{path}': neither a file nor one of the recipes in configs/{nearest}")


def recipes() -> dict[str, str]:
    """Name -> first sentence of the header, for each recipe shipped with dinoreg."""
    files = sorted(file for folder in _recipe_folders() for file in folder.glob("*.yaml"))
    headers = {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}
    return {name: header.partition(". ")[0].rstrip(".") for name, header in headers.items()}


def _recipe_folders() -> list[Path]:
    # An installed package carries the recipes inside; a checkout has them beside the package.
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def _shipped(name: str) -> Iterator[Path]:
    for folder in _recipe_folders():
        yield from (folder / name, folder / f"{name}.yaml")


# -- the schema ------------------------------------------------------------------------------------------------------


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of each option; a section is listed too, with its dataclass as the type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = prefix + field.name, hints[field.name]
        yield key, kind
        if dataclasses.is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{key}.")


def leaf_keys(schema: type) -> list[str]:
    """The dotted keys of all options of a schema, sections left out."""
    return [key for key, kind in _leaves(schema) if not dataclasses.is_dataclass(kind)]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union (without None), or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for part in typing.get_args(kind) if part is not type(None))
    return (kind,)


def _is_text(kind: Any) -> bool:
    return all(part is str or typing.get_origin(part) is typing.Literal for part in _alternatives(kind))


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list


# -- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3: version 1.1, which PyYAML implements, calls that a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_recipe(path: Path, kinds: dict[str, Any], seen: tuple[Path, ...] = ()) -> Iterator[_Setting]:
    """What a recipe says, after what its base says."""
    if path.resolve() in seen:
        circle = " -> ".join(str(file) for file in (*seen, path.resolve()))
        raise ConfigError(f"recipes name each other as base in a circle: {circle}")
    root = _parse(path)
    root.value = [(name, value) for name, value in root.value if name.value not in OTHERS or name.value in kinds]
    base = [value for name, value in root.value if name.value == "base"]
    if base:
        yield from _read_recipe(_find_base(base[0], path), kinds, (*seen, path.resolve()))
        root.value = [(name, value) for name, value in root.value if name.value != "base"]
    yield from _flatten(root, path, kinds)


def _compose_finite(text: str) -> yaml.Node | None:
    """The nodes of a document, of which nothing has been made yet. Raises YAMLError."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _count(root, {})
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return root


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Nodes below a node, where each alias counts as what it stands for. Raises YAMLError when there is no end."""
    if id(node) not in counts:
        counts[id(node)] = MAX_NODES  # until it is known: whoever holds itself has too many
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        items = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        counts[id(node)] = 1 + sum(_count(item, counts) for item in items)
    if counts[id(node)] >= MAX_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES} values, or for themselves")
    return counts[id(node)]


def _parse(path: Path) -> yaml.MappingNode:
    try:
        root = _compose_finite(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        hint = "; quote texts that hold any of {}[],:#" if "flow" in str(getattr(error, "context", "")) else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{where}: not readable as YAML: {problem}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a recipe is a list of 'option: value' lines")
    return root


def _find_base(node: yaml.Node, recipe: Path) -> Path:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"is the name of one recipe (from {_at(recipe, node)})", key="base")
    beside = recipe.parent / str(node.value)
    for candidate in (beside, Path(f"{beside}.yaml")):
        if candidate.is_file():
            return candidate
    try:
        return find_recipe(str(node.value))
    except ConfigError as error:
        raise ConfigError(f"{error.message} (from {_at(recipe, node)})", key="base") from None


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _flatten(root: yaml.MappingNode, path: Path, kinds: dict[str, Any], prefix: str = "") -> Iterator[_Setting]:
    """The options of a YAML mapping, with dotted keys; sections are descended into."""
    seen: set[str] = set()
    for name, value in root.value:
        origin = _at(path, name)
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError(f"an option's name is a word (from {origin})", key=prefix.rstrip("."))
        key = prefix + str(name.value)
        if key in seen:
            raise ConfigError(f"given twice (from {origin})", key=key)
        seen.add(key)
        _known(key, kinds, origin)
        if not dataclasses.is_dataclass(kinds[key]):
            yield _Setting(key, value, origin)
        elif isinstance(value, yaml.MappingNode):
            yield from _flatten(value, path, kinds, f"{key}.")
        elif not _is_null(value):
            raise _not_a_value(key, kinds, origin)


def _read_override(text: str, kinds: dict[str, Any]) -> _Setting:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals:
        raise ConfigError(f"'{text}' is not of the form key=value (from {COMMAND_LINE})")
    _known(key, kinds, COMMAND_LINE)
    if dataclasses.is_dataclass(kinds[key]):
        raise _not_a_value(key, kinds, COMMAND_LINE)
    if not value:
        raise ConfigError(f"no value after '='; write {key}=null for none (from {COMMAND_LINE})", key=key)
    return _Setting(key, _value_node(key, value, kinds[key]), COMMAND_LINE)


def _value_node(key: str, value: str, kind: Any) -> yaml.Node:
    """A command-line value is YAML, except that an unquoted text stays as typed: paths hold ': ', '{' and '#'."""
    if value in ("null", "~"):
        return _compose(key, value)
    if _is_list(kind):
        items = _split(value[1:-1]) if value[0] == "[" and value[-1] == "]" else [value]
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_item_node(key, item) for item in items])
    if _is_text(kind) and value[0] not in "\"'":
        return _as_typed(value)
    return _compose(key, value)


def _item_node(key: str, item: str) -> yaml.Node:
    """A number, a quoted text, or a mapping such as {path: a.tar, weight: 2} is YAML; a pattern {a,b}.tar is not."""
    mapping = item.startswith("{") and re.match(r"\{\s*[\w'\"]+\s*:\s", item)
    if mapping or item[:1] in ("'", '"') or not re.search(r"[][{}:#]", item):
        return _compose(key, item)
    if item.startswith("["):
        raise ConfigError(f"cannot read the value {_short(item)} (from {COMMAND_LINE})", key=key)
    return _as_typed(item)


def _split(text: str) -> list[str]:
    """Parts between commas, where these are in neither brackets nor quotes."""
    parts = re.findall(r"""(?:'[^']*'|"[^"]*"|\{(?:[^{}]|\{[^{}]*\})*\}|[^,])+""", text)
    return [part.strip() for part in parts if part.strip()]


def _as_typed(value: str) -> yaml.Node:
    return yaml.ScalarNode("tag:yaml.org,2002:str", value, style="'")


def _compose(key: str, value: str) -> yaml.Node:
    try:
        return _compose_finite(value) or _as_typed(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"cannot read the value {_short(value)}; "
            f"put quotes around texts that hold any of {{}}[],:# (from {COMMAND_LINE})",
            key=key,
        ) from None


def _known(key: str, kinds: dict[str, Any], origin: str) -> None:
    if key not in kinds:
        options = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
        raise ConfigError(f"no such option; the nearest is {_nearest(key, options)} (from {origin})", key=key)


def _not_a_value(key: str, kinds: dict[str, Any], origin: str) -> ConfigError:
    example = next(name for name in kinds if name.startswith(f"{key}."))
    return ConfigError(f"is a section, not an option; give its options, such as {example} (from {origin})", key=key)


def _nearest(key: str, candidates: Sequence[str]) -> str:
    """By the whole key and by its last word: 'lr' means optim.lr, and 'optim.batch_size' means train.batch_size."""

    def likeness(candidate: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2])
        return SequenceMatcher(None, key, candidate).ratio() + last.ratio()

    return max(candidates, key=likeness)


# -- merging and checking --------------------------------------------------------------------------------------------


def _apply(config: DictConfig, setting: _Setting, kinds: dict[str, Any]) -> None:
    kind = kinds[setting.key]
    try:
        value = _to_value(setting.node, kind)
        _refuse_resolvers(value)
        OmegaConf.update(config, setting.key, value, merge=False)
    except OmegaConfBaseException as error:
        text = f"needs a value of type {_type_name(kind)}" if value is None else _first_line(error)
        raise ConfigError(f"{text} (from {setting.origin})", key=setting.key) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{_first_line(error)} (from {setting.origin})", key=setting.key) from None


def _refuse_resolvers(value: Any) -> None:
    """`${optim.lr}` means another option; OmegaConf knows more, such as `${oc.env:KEY}`, which reads what is secret."""
    if isinstance(value, str):
        for text in re.findall(r"\$\{[^}]*\}?", value):
            if not re.fullmatch(r"\$\{[\w.\[\]]+\}", text):
                raise ValueError(f"{text} is not filled in: only names of other options are, as in ${{seed}}")
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_resolvers(item)


def _to_value(node: yaml.Node, kind: Any) -> Any:
    if _is_text(kind) and isinstance(node, yaml.ScalarNode) and node.tag in PLAIN:
        return node.value  # as written: `name: 007` stays '007'
    value = _construct(node)
    members = _alternatives(kind)
    if isinstance(value, float) and value.is_integer() and int in members and float not in members:
        return int(value)  # 1e5 steps
    if _is_list(kind) and value is not None and not isinstance(value, list):
        return [value]  # one source needs no brackets
    return value


def _construct(node: yaml.Node) -> Any:
    """Plain values of a node: the safe loader's tags make nothing else. Raises YAMLError."""
    try:
        return _Loader("").construct_document(node)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:  # dates, numbers that are none
        raise yaml.YAMLError(f"cannot be read as {node.tag.rpartition(':')[2]}: {_first_line(error)}") from None


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _type_name(kind: Any) -> str:
    return " or ".join(getattr(part, "__name__", str(part)) for part in _alternatives(kind))


def _first_line(error: Exception) -> str:
    return _short(next(iter(str(error).strip().splitlines()), type(error).__name__))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _check(config: Any, prefix: str = "") -> None:
    """Ask every nested dataclass that has a `check()`, parts first. Numbers must be finite everywhere."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check(value, f"{prefix}{field.name}.")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"must be finite, not {number}", key=prefix + field.name)
    if hasattr(config, "check"):
        try:
            config.check()
        except ConfigError as error:
            raise ConfigError(error.message, key=prefix + error.key) from None


def _located(message: str, key: str, origins: dict[str, str]) -> ConfigError:
    """Add where the option, and each other that the message mentions, was written."""
    words = {key, *re.findall(r"[\w.]*\w", message)}
    section = key.rpartition(".")[0]
    # A default may only have become wrong because of its neighbours: name the latest of those.
    neighbours = [name for name in origins if section and name.startswith(f"{section}.")][-3:]
    written = [name for name in origins if name in words] or neighbours
    if not written:
        where = "the defaults" if key else ""
    elif written == [key]:
        where = origins[key]
    else:
        return ConfigError(f"{message} ({', '.join(f'{name} from {origins[name]}' for name in written)})", key=key)
    return ConfigError(f"{message} (from {where})" if where else message, key=key)
