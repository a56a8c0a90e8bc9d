"""Configurations are read and never run: no code, no environment, no end of memory; one line for whatever tries."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from test_config import Car, mistake, recipe

from dinoreg.config import ConfigError, load, to_yaml


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "5")


CODE = "!!python/object/apply:os.system ['touch {witness}']"
OTHERS = ["!!python/name:os.system", "!!python/module:os", "!!python/object/new:os.system [x]", "!!python/tuple [1]"]


@pytest.mark.parametrize(
    "text",
    ["speed: {x}", "name: {x}", "engine: {x}", "sources: {x}", "sources: [{x}]", "sources: [{{path: {x}}}]"]
    + ["{x}", "base: {x}"]
    + ["engine: {{gears: {x}}}", "? {x}\n: 1", "engine: {{? {x}\n: 1}}", "sources: [{{? {x}\n: 1}}]"],
)  # fmt: skip
def test_tags_that_name_python_make_nothing(tmp_path: Path, text: str) -> None:
    witness = tmp_path / "witness"
    for code in (CODE.format(witness=witness), *OTHERS):
        mistake(recipe(tmp_path, text.format(x=code)))
    assert not witness.exists()


@pytest.mark.parametrize("override", ["speed={x}", "engine.gears={x}", "engine.ratios={x}", "sources=[{{path: {x}}}]"])
def test_nor_do_they_on_the_command_line(tmp_path: Path, override: str) -> None:
    for code in (CODE.format(witness=tmp_path / "witness"), *OTHERS):
        mistake(None, override.format(x=code))
    car = load(Car, None, [f"name={CODE}", f"sources={CODE}"])  # texts stay texts
    assert car.name == CODE and car.sources == [CODE]
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,x}",
        "x${oc.env:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "${${name}:SECRET}",
        "${oc.create:{}}",
        "${oc.dict.values:engine}",
        "${",
        "${a b}",
        "${oc.env",
    ],
)
def test_the_environment_is_not_read(tmp_path: Path, value: str) -> None:
    for key in ("name", "speed", "nickname", "sources"):
        for text in (mistake(None, f"{key}={value}"), mistake(recipe(tmp_path, f"{key}: '{value}'\n"))):
            assert "is not filled in: only names of other options are" in text
    mistake(recipe(tmp_path, f"sources: [{{path: ['{value}'], weight: 1}}]\nengine: {{ratios: [1, 2]}}"))
    mistake(recipe(tmp_path, f"name: oc.env\nengine: {{ratios: ['{value}', 2]}}"))


def test_other_options_may_still_be_named() -> None:
    assert load(Car, None, ["nickname=${name}-${engine.kind}", "name=x$y"]).nickname == "x$y-petrol"


def nested(first: str, row: str, levels: int = 9) -> str:
    """A page of aliases, each line of which stands for nine or ten of the line before."""
    lines = [f"  - &{chr(98 + i)} {row.replace('@', '*' + chr(97 + i))}" for i in range(levels)]
    return "\n".join(["sources:", f"  - &a {first}", *lines, ""])


@pytest.mark.parametrize(
    "text",
    [
        nested("[x, x]", "[" + ", ".join(["@"] * 10) + "]"),
        nested("{path: x}", "{" + ", ".join(f"k{i}: @" for i in range(9)) + "}"),
        nested("{path: x}", "{<<: [" + ", ".join(["@"] * 10) + "]}"),
        "sources: &a [*a]",
        "sources: &a {path: *a}",
        "engine: &a\n  sizes: *a",
        "engine: &a\n  <<: *a",
        "base: &a [*a]",
    ],
)
def test_documents_without_end_are_refused(tmp_path: Path, text: str) -> None:
    path = recipe(tmp_path, text)
    tracemalloc.start()
    found = mistake(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "aliases" in found
    assert peak < 2**25
    mistake(None, "speed=" + text.partition(":")[2].strip())


@pytest.mark.parametrize("text", ["[" * 1000 + "]" * 1000, "{a: " * 1000 + "}" * 1000])
def test_nesting_has_an_end(tmp_path: Path, text: str) -> None:
    assert "nested too deeply" in mistake(recipe(tmp_path, f"sources: {text}"))
    mistake(None, f"speed={text}")


def test_aliases_may_be_used(tmp_path: Path) -> None:
    text = "sources:\n- &a {path: x, weight: 1}\n- {<<: *a, path: y}\nengine: {ratios: &r [1, 2], sizes: *r}\n"
    car = load(Car, recipe(tmp_path, text))
    assert car.sources == [{"path": "x", "weight": 1}, {"path": "y", "weight": 1}] and car.engine.sizes == [1.0, 2.0]


@pytest.mark.parametrize(
    "text",
    ["speed: !!timestamp x", "speed: !!bool x", "speed: !!int x", "speed: !!float x", "speed: !!binary x"]
    + ["speed: !x 1", "base: [a]", "base: {a: b}"]
    + ["speed: 2001-99-99", f"engine: {{power: {'9' * 5000}}}", "\0speed: 1", "[a]: 1", "? {a: b}\n: 1", "a\tb: ["]
    + ["speed: 1\n---\nspeed: 2", "%YAML 9.9\n---\nspeed: 1", "sources: [!!set {a}]"]
    + ["sources: [2024-01-01]", "speed: ???", "*a : 1", "base: /etc/passwd", "sources: [{? [a]\n: 1}]"],
)  # fmt: skip
def test_strange_values_are_one_line(tmp_path: Path, text: str) -> None:
    said = mistake(recipe(tmp_path, text))
    assert said and "\n" not in said


def test_long_values_are_not_told_in_full() -> None:
    for override in ("speed=" + "[" * 5000, "engine.power=" + "9" * 5000, "sources=[[" + "x{" * 5000 + "]"):
        with pytest.raises(ConfigError) as caught:
            load(Car, None, [override])
        assert len(str(caught.value)) < 500


def test_what_was_read_is_written_as_it_is(tmp_path: Path) -> None:
    car = load(Car, None, [f"name={CODE}", "nickname='!!python/name:os.system'", "sources=['*a', '&b c']"])
    assert load(Car, recipe(tmp_path, to_yaml(car))) == car
