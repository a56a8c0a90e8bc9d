"""What a checkpoint says about its run, beside the tensors: `run.json`, for people and for going on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dinoreg.config import ConfigError


@dataclass(frozen=True)
class About:
    """The position of a run is its number of steps: images, crops, masks and schedules follow from it."""

    step: int = 0
    images: int = 0  # seen, over all ranks: the global number of the sample that comes next
    world: int = 1  # processes that saved it; any number may go on
    data: str | None = None  # fingerprint of the images; None where they are streamed
    streams: Any = None  # shards that streams have done in the current pass: they have no other position
    bad: dict[str, int] = field(default_factory=dict)  # samples that could not be used, by reason
    skipped: int = 0  # steps that were not finite
    wandb: str | None = None  # the identity of the run there

    @staticmethod
    def of(content: Mapping[str, Any]) -> About:
        """From what was read; what a version does not know is left out."""
        known = {each.name for each in fields(About)}
        return About(**{name: value for name, value in content.items() if name in known})

    def check_data(self, fingerprint: str | None, origin: str) -> None:
        """Raises ConfigError when the images are not those that the run has been seeing."""
        if self.data != fingerprint:
            raise ConfigError(
                "these are other images than those of the run until now (more, fewer, or in other shards), and their "
                f"order would be another. Give the old ones, or a new run_dir with train.go_on_from={origin}",
                key="data.sources",
            )
