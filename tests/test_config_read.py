"""No dead option: code other than its own validation reads every leaf of the schema.

Which option an attribute means is decided by following types, not names: `every` is read for `monitor.every` only where
something annotated as, or reached from, a MonitorConfig is asked for it.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path

import pytest

import dinoreg
from dinoreg.config import leaf_keys
from dinoreg.train.recipe import RunConfig

PACKAGE = Path(dinoreg.__file__).parent
VALIDATION = {"config.py", "recipe.py", "plan.py"}  # they look at options without doing what these say


def declarations(schema: type) -> dict[tuple[str, str], str]:
    """(class, field) -> class of the section it holds, or '' for a leaf, for a schema and all its sections."""
    hints = typing.get_type_hints(schema)
    found: dict[tuple[str, str], str] = {}
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        section = dataclasses.is_dataclass(kind)
        found[schema.__name__, field.name] = kind.__name__ if section else ""
        if section:
            found |= declarations(typing.cast(type, kind))
    return found


class Reads(ast.NodeVisitor):
    """Collects the (class, field) pairs that some code reads, going through it until no more types become known."""

    def __init__(self, schema: type) -> None:
        self.fields = declarations(schema)
        self.attributes = {pair: kind for pair, kind in self.fields.items() if kind}
        self.classes = {name for name, _ in self.fields}
        self.found: set[tuple[str, str]] = set()
        self.scope: dict[str, str] = {}
        self.inside = ""

    def search(self, sources: Iterable[str]) -> set[tuple[str, str]]:
        trees = [ast.parse(source) for source in sources]
        self.classes |= {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        known = -1
        while known < len(self.attributes):
            known = len(self.attributes)
            for tree in trees:
                self.visit(tree)
        return self.found

    def type_of(self, node: ast.AST | None) -> str:
        if isinstance(node, ast.Name):
            return self.scope.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return self.attributes.get((self.type_of(node.value), node.attr), "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.classes:
            return node.func.id
        return ""

    def annotated(self, annotation: ast.AST | None) -> str:
        """The class that an annotation names, `X | None` and quoted ones too."""
        words = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
        return next(iter(words & self.classes), "")

    def learn(self, target: ast.AST, kind: str) -> None:
        if kind and isinstance(target, ast.Name):
            self.scope[target.id] = kind
        elif kind and isinstance(target, ast.Attribute) and (owner := self.type_of(target.value)):
            self.attributes.setdefault((owner, target.attr), kind)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.inside = self.inside, node.name
        self.generic_visit(node)
        self.inside = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "check":
            return
        outer, self.scope = self.scope, dict(self.scope)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            self.scope[argument.arg] = self.annotated(argument.annotation)
        if self.inside and arguments and arguments[0].arg == "self":
            self.scope["self"] = self.inside
        if any(isinstance(name, ast.Name) and "property" in name.id for name in node.decorator_list):
            self.attributes.setdefault((self.inside, node.name), self.annotated(node.returns))
        self.generic_visit(node)
        self.scope = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        kind = self.annotated(node.annotation)
        if self.inside and not self.scope.get("self") and isinstance(node.target, ast.Name) and kind:
            self.attributes.setdefault((self.inside, node.target.id), kind)  # a field of a dataclass
        self.learn(node.target, kind)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    self.learn(one, self.type_of(value))
            else:
                self.learn(target, self.type_of(node.value))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        pair = (self.type_of(node.value), node.attr)
        if isinstance(node.ctx, ast.Load) and pair in self.fields:
            self.found.add(pair)
        self.generic_visit(node)


@pytest.fixture(scope="module")
def reads() -> set[tuple[str, str]]:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in VALIDATION]
    return Reads(RunConfig).search(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("key", leaf_keys(RunConfig))
def test_leaf_is_read(key: str, reads: set[tuple[str, str]]) -> None:
    """The option, and each section on the way to it."""
    fields, owner = declarations(RunConfig), "RunConfig"
    for word in key.split("."):
        assert (owner, word) in reads, f"nothing reads '{word}' of {owner}, so {key} has no effect"
        owner = fields[owner, word]


def test_the_search_itself() -> None:
    """What counts as reading, and what does not."""
    source = """
class Loop:
    def __init__(self, cfg: RunConfig, other: Thing) -> None:
        self.cfg = cfg
        optim, wandb = cfg.optim, other.wandb
        other.keep, optim.lr, self.cfg.optim.clip
class CheckpointConfig:
    def check(self) -> None:
        self.keep
    @property
    def half(self) -> int:
        return self.every
def step(loop: "Loop | None", x: MonitorConfig | None = None) -> None:
    train = loop.cfg.train
    train.steps = 3
    for _ in range(loop.cfg.train.log_every): x.knn_k
"""
    expected = {
        ("RunConfig", "optim"),
        ("OptimConfig", "lr"),
        ("OptimConfig", "clip"),
        ("CheckpointConfig", "every"),
        ("RunConfig", "train"),
        ("LoopConfig", "log_every"),
        ("MonitorConfig", "knn_k"),
    }
    found = Reads(RunConfig).search([source.replace('"Loop | None"', "Loop | None")])
    assert found == expected
