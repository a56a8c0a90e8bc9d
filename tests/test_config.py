"""Loading: what merges into what, and what each mistake is told like."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dinoreg.config import ConfigError, find_recipe, leaf_keys, load, to_yaml


@dataclass
class Engine:
    kind: Literal["petrol", "steam", "no"] = "petrol"
    power: int = 100
    gears: int | None = None
    ratios: tuple[float, float] = (0.5, 2.0)
    warmup: int | float | str = 0.1
    sizes: list[float] = field(default_factory=lambda: [1.0])

    def check(self) -> None:
        if self.power <= 0:
            raise ConfigError(f"must be positive, not {self.power}", key="power")


@dataclass
class Car:
    name: str = "car"
    nickname: str | None = None
    speed: float = 1.0
    fast: bool = False
    sources: list[Any] = field(default_factory=list)
    engine: Engine = field(default_factory=Engine)

    def check(self) -> None:
        if self.speed > self.engine.power:
            raise ConfigError(f"{self.speed:g} is more than engine.power {self.engine.power} gives", key="speed")


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def mistake(path: Path | str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Car, path, overrides)
    text = str(caught.value)
    folder = str(Path(path).parent) if path else "/no/folder"  # of the test, however long its name
    assert "\n" not in text and len(text.replace(folder, "")) < 250
    return text


def test_defaults_then_base_then_recipe_then_command_line(tmp_path: Path) -> None:
    recipe(tmp_path, "name: root\nspeed: 2\nengine: {power: 5, gears: 3}\n", "deep/root.yaml")
    recipe(tmp_path, "base: deep/root\nspeed: 3\n", "middle.yaml")
    top = recipe(tmp_path, "base: middle.yaml\nengine:\n  gears: 4\n")
    car = load(Car, top, ["engine.kind=steam", "fast=true"])
    assert isinstance(car, Car) and isinstance(car.engine, Engine)
    assert (car.name, car.speed, car.fast) == ("root", 3.0, True)
    assert car.engine == Engine(kind="steam", power=5, gears=4)
    assert load(Car, None) == Car()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=007", "007"),
        ("name=1e3", "1e3"),
        ("name=yes", "yes"),
        ("name=2024-01-01", "2024-01-01"),
        ("name='null'", "null"),
        ("name=''", ""),
        ("name=a=b", "a=b"),
        ("name=run: 3 #x", "run: 3 #x"),
        ("nickname=null", None),
        ("speed=1e-3", 1e-3),
        ("speed=-.5e+1", -5.0),
        ("speed=7", 7.0),
        ("engine.power=1e5", 100000),
        ("engine.gears=null", None),
        ("engine.kind=no", "no"),
        ("engine.ratios=[1, 1e-1]", (1.0, 0.1)),
        ("engine.warmup=5 epochs", "5 epochs"),
        ("engine.warmup=1e6 images", "1e6 images"),
        ("engine.warmup=0.25", 0.25),
        ("engine.sizes=3", [3.0]),
        ("sources=/data/images", ["/data/images"]),
        ("sources=a-{000..004}.tar", ["a-{000..004}.tar"]),
        ("sources={a,b}.tar", ["{a,b}.tar"]),
        ("sources=pipe:curl -s http://host/a.tar", ["pipe:curl -s http://host/a.tar"]),
        ("sources=[a, 'b-{0..3}.tar', {path: c, weight: 2}]", ["a", "b-{0..3}.tar", {"path": "c", "weight": 2}]),
        ("sources=[a-{000..004}.tar]", ["a-{000..004}.tar"]),
        (
            "sources=[a-{0,1}.tar, {b,c}.tar,pipe:curl http://h/d.tar]",
            ["a-{0,1}.tar", "{b,c}.tar", "pipe:curl http://h/d.tar"],
        ),
        (
            "sources=[{path: 'a-{0..3}.tar', weight: 1e-1},{path: b, weight: 2}]",
            [{"path": "a-{0..3}.tar", "weight": 0.1}, {"path": "b", "weight": 2}],
        ),
        ("sources=['a,b', \"c: d\"]", ["a,b", "c: d"]),
        ("engine.sizes=[1, 2e0]", [1.0, 2.0]),
        ("sources=[]", []),
    ],
)
def test_command_line_values(override: str, value: object) -> None:
    found: Any = load(Car, None, [override, "engine.power=100000" if "power" not in override else "fast=no"])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_recipe_texts_stay_as_written(tmp_path: Path) -> None:
    car = load(Car, recipe(tmp_path, "name: 0123\nnickname: 1e3\nsources: shards/a.tar\nspeed: 2e0\nengine:\n"))
    assert (car.name, car.nickname, car.sources, car.speed) == ("0123", "1e3", ["shards/a.tar"], 2.0)


def test_empty_recipe(tmp_path: Path) -> None:
    assert load(Car, recipe(tmp_path, "# nothing\n")) == Car()


def test_yaml_round_trip(tmp_path: Path) -> None:
    car = load(Car, None, ["name=1e3", "nickname='null'", "speed=1e-9", "sources=[a, {path: 'b: c', weight: 2}]"])
    assert load(Car, recipe(tmp_path, to_yaml(car))) == car


def test_interpolation_is_resolved() -> None:
    assert load(Car, None, ["nickname=${name}-2"]).nickname == "car-2"
    assert "nowhere" in mistake(None, "nickname=${nowhere}")


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("engine.powr=1", "engine.power"),
        ("power=1", "engine.power"),
        ("engine.speed=1", "speed"),
        ("motor.gears=1", "engine.gears"),
        ("engine.sizes.x=1", "engine.sizes"),
        ("nam=1", "name"),
        ("=1", ""),
    ],
)
def test_unknown_key_names_the_nearest(written: str, nearest: str) -> None:
    text = mistake(None, written)
    assert text.startswith(written.partition("=")[0]) and "no such option" in text
    assert f"the nearest is {nearest}" in text and "the command line" in text


def test_unknown_key_names_file_and_line(tmp_path: Path) -> None:
    recipe(tmp_path, "speed: 1\nengine:\n  gear: 3\n", "base.yaml")
    top = recipe(tmp_path, "base: base.yaml\n")
    text = mistake(top)
    assert text == f"engine.gear: no such option; the nearest is engine.gears (from {tmp_path / 'base.yaml'}:3)"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.power=abc", "could not be converted to Integer"),
        ("engine.power=1.5", "could not be converted to Integer"),
        ("engine.power=true", "could not be converted to Integer"),
        ("engine.power=null", "needs a value of type int"),
        ("engine.kind=diesel", "expected one of ['petrol', 'steam', 'no']"),
        ("engine.ratios=[1]", "length 1 does not match"),
        ("engine.ratios=[1,2,3]", "length 3 does not match"),
        ("engine.ratios=1", "engine.ratios"),
        ("engine.sizes=[a]", "could not be converted to Float"),
        ("engine.sizes=[1", "cannot read the value [1"),
        ("sources=[{path: a-{0..3}.tar, weight: 1}]", "put quotes around"),
        ("fast=perhaps", "not a valid bool"),
        ("speed=quick", "could not be converted to Float"),
        ("speed=.nan", "must be finite"),
        ("speed=inf", "must be finite"),
        ("engine.ratios=[0, nan]", "must be finite"),
        ("speed={a: 1}", "speed"),
        ("name=null", "needs a value of type str"),
        ("engine=3", "is a section, not an option; give its options, such as engine.kind"),
        ("fast", "'fast' is not of the form key=value"),
        ("speed=", "write speed=null for none"),
        ("--dry-run", "'--dry-run' is not of the form key=value"),
    ],
)
def test_wrong_values_on_the_command_line(override: str, says: str) -> None:
    text = mistake(None, override)
    assert says in text and "the command line" in text
    assert text.startswith(override.partition("=")[0]) or "key=value" in text


@pytest.mark.parametrize(
    ("content", "says", "line"),
    [
        ("speed: 1\nspeed: 2\n", "speed: given twice", 2),
        ("speed: 1\nengine:\n  power: x\n", "engine.power: Value 'x'", 3),
        ("speed: 1\nengine: 7\n", "engine: is a section", 2),
        ("speed: [1\n", "not readable as YAML", 2),
        ("speed: 1\n\tname: x\n", "not readable as YAML", 2),
        ("sources: [a-{000..004}.tar]\n", "quote texts", 1),
        ("name:\n", "name: needs a value of type str", 1),
        ("base: nowhere.yaml\n", "no recipe 'nowhere.yaml'", 1),
        ("engine:\n  power: !!python/name:os.system x\n", "engine.power", 2),
    ],
)
def test_wrong_recipes_name_file_and_line(tmp_path: Path, content: str, says: str, line: int) -> None:
    file = recipe(tmp_path, content)
    text = mistake(file)
    assert says in text and f"{file}:{line}" in text


def test_recipe_must_be_a_mapping(tmp_path: Path) -> None:
    file = recipe(tmp_path, "- speed\n")
    assert mistake(file) == f"{file}: a recipe is a list of 'option: value' lines"


def test_binary_recipe(tmp_path: Path) -> None:
    file = tmp_path / "picture.yaml"
    file.write_bytes(b"\x89PNG\xff\xfe")
    assert str(file) in mistake(file)


def test_bases_in_a_circle(tmp_path: Path) -> None:
    recipe(tmp_path, "base: b\n", "a.yaml")
    recipe(tmp_path, "base: a\n", "b.yaml")
    text = mistake(tmp_path / "a.yaml")
    assert "in a circle" in text and "b.yaml ->" in text


def test_missing_recipe_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    text = mistake("configs/dmeo.yaml")
    assert text.startswith("no recipe 'configs/dmeo.yaml'") and text.endswith("the nearest recipe is demo")
    with pytest.raises(ConfigError, match="no recipe"):
        find_recipe(tmp_path)  # a folder is not a recipe


def test_checks_of_parts_and_of_the_whole_name_their_origin(tmp_path: Path) -> None:
    assert mistake(None, "engine.power=0") == "engine.power: must be positive, not 0 (from the command line)"
    file = recipe(tmp_path, "engine:\n  power: 10\n")
    assert mistake(file, "speed=20") == (
        f"speed: 20 is more than engine.power 10 gives (engine.power from {file}:2, speed from the command line)"
    )
    assert mistake(file.parent / "recipe", "speed=20").count("from") == 2  # the suffix may be left out


def test_leaf_keys_leave_sections_out() -> None:
    assert leaf_keys(Car)[:5] == ["name", "nickname", "speed", "fast", "sources"]
    assert "engine" not in leaf_keys(Car) and "engine.ratios" in leaf_keys(Car)
