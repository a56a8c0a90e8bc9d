"""What tests on a real Slurm share: the cluster, images, and somebody's checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import outside, write_images
from slurm_lab import SlurmLab, missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of this folder, with a reason, where there is no Slurm."""
    absent = ", ".join(missing())
    for item in items:
        if absent and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no real Slurm is installed (slurm-wlm, munge): no {absent}"))


@pytest.fixture(scope="session")
def lab() -> Iterator[SlurmLab]:
    """Two nodes of two cores, partitions `main` and `high`."""
    with SlurmLab() as lab:
        yield lab


@pytest.fixture(scope="session")
def env(lab: SlurmLab) -> dict[str, str]:
    """Of a user of the cluster."""
    return outside(**{name: lab.env[name] for name in ("SLURM_CONF", "PATH")})


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")
