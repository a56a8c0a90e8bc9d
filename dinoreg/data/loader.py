"""From sources to batches: workers, collation, device prefetch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """Where images come from, and how the host reads them."""

    # Folders, tar shards (brace patterns), `pipe:` or http URLs; or {path: ..., weight: ...} to mix by weight.
    sources: list[Any] = field(default_factory=list)
    workers: int = -1  # processes a rank; -1 chooses from the cores at hand, 0 loads in the main process
    prefetch: int = 2  # batches each worker prepares ahead
    shuffle_window: int = 16  # shards whose samples are shuffled together, to keep reads local
    stream_buffer: int = 1000  # samples held for shuffling where shards can only be streamed
    max_bad_share: float = 0.05  # of the samples tried; beyond it the run stops
