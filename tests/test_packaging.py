"""What setup.py asks for, constraints.txt pins, and the Makefile installs first."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def pins(python: str) -> dict[str, str]:
    """Name -> version that constraints.txt means on a Linux machine with this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.name not in found, f"{requirement.name} is pinned twice for Python {python}"
            found[requirement.name] = str(requirement.specifier)
    return found


def wanted() -> list[Requirement]:
    """All requirements in setup.py, extras included: what its call of setup() would pass on."""
    passed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: passed.update(options))
        runpy.run_path(str(ROOT / "setup.py"))
    return [Requirement(text) for text in sum(passed["extras_require"].values(), passed["install_requires"])]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(python: str) -> None:
    pinned = pins(python)
    assert len(wanted()) > 15
    for requirement in wanted():
        exact = pinned[requirement.name]
        assert exact.startswith("==") and requirement.specifier.contains(exact.removeprefix("=="))


def test_torch_comes_first_and_by_the_exact_version() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH := torch{pins('3.11')['torch']}\n" in makefile
    recipe = makefile[makefile.index("$(VENV)/.torch: ") :]
    assert "$(TORCH)" in recipe and "--editable" not in recipe


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and script.read_text().rstrip().endswith("exec make test")
    subprocess.run(["bash", "-n", str(script)], check=True)
