"""The schema of a run that is launched: all that `dinoreg train` reads, and the section beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from dinoreg.cli import other_lengths_off, require_sources
from dinoreg.config import ConfigError, load
from dinoreg.data.sources import expand
from dinoreg.data.streams import is_streamed
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.rundir import refuse_changes
from launch.config import LaunchConfig

LOOKED_AT = 1000  # shards that are looked at before a job is queued; it looks at all of them itself


@dataclass
class LaunchedRun(RunConfig):
    """A run and where it is to run. `dinoreg train` passes over the section `launch`."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def run(self) -> RunConfig:
        """What is run, without the launching."""
        return RunConfig(**{each.name: getattr(self, each.name) for each in fields(RunConfig)})


def load_launched(recipe: str | Path, overrides: Sequence[str]) -> LaunchedRun:
    """As `dinoreg train` would read it, with an absolute run directory. Raises ConfigError, also for missing images."""
    config = load(LaunchedRun, recipe, [*other_lengths_off(overrides), *overrides])
    config.run_dir = str(Path(config.run_dir).expanduser().absolute())
    check_world(config, config.launch.world)
    require_sources(config.data.sources)
    _check_sources(config.data.sources)
    refuse_changes(Path(config.run_dir) / "config.yaml", config.run())
    return config


def _check_sources(sources: Sequence[object]) -> None:
    paths = [source.get("path", "") if isinstance(source, dict) else source for source in sources]
    names = [path for entry in paths for path in (entry if isinstance(entry, list) else [entry])]
    files = [file for name in names for file in expand(str(name)) if not is_streamed(file) and "://" not in file]
    for file in files[:LOOKED_AT]:
        if not Path(file).exists():
            raise ConfigError(f"no such file or folder: {file}", key="data.sources")
