"""Putting batches through a frozen network: loading, normalising, precision, and batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinoreg.config import ConfigError
from dinoreg.data.images import DataError
from dinoreg.data.workers import fit_shared_memory, start_worker, worker_context
from dinoreg.parallel.precision import Precision, resolve_precision
from eval.backbone import Backbone
from eval.suite import Context

R = TypeVar("R")
S = TypeVar("S")
B = TypeVar("B", bound="Splittable")

WORTH_WORKERS = 2000  # images from which starting processes to decode them pays
PREFETCH = 2  # batches each worker prepares ahead


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """For the network alone: what is learnt on its features stays fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def normalise(pixels: Tensor, backbone: Backbone) -> Tensor:
    """uint8 (B, C, H, W) as the network wants it: [0, 1], less the mean, by the standard deviation."""
    mean, std = (torch.tensor(each, device=pixels.device).view(1, -1, 1, 1) for each in backbone.normalisation)
    return (pixels.float() / 255 - mean) / std


def load(dataset: Dataset[S], batches: Sequence[Sequence[int]], context: Context, image_bytes: int) -> Iterator[Any]:
    """The batches of places in a dataset, collated; by worker processes where there is enough to do.

    Raises DataError where a worker dies.
    """
    workers = context.workers if sum(map(len, batches)) >= WORTH_WORKERS else 0
    size = max(map(len, batches), default=0) * image_bytes
    workers = fit_shared_memory(workers, False, size, PREFETCH, context.ranks.local_world)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sequence of sequences will do
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # or it would take a number from the global one
        pin_memory=context.device.type == "cuda",
    )
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that decodes images died, most often for want of memory; the same command goes on where it was"
        ) from error


class Splittable(Protocol):
    """A batch: a tensor, or something of several ones."""

    def __len__(self) -> int: ...
    def split(self: B, most: int, /) -> Sequence[B]: ...


class Fitting:
    """Calls a function on a batch in as many pieces as memory asks for; `most` is the size of a piece."""

    def __init__(self, most: int, say: Callable[[str], None]) -> None:
        self.most, self._say, self._said = most, say, False

    def __call__(self, function: Callable[[B], R], batch: B) -> list[R]:
        """The results of the pieces. Raises ConfigError where not even one image fits."""
        while (results := self._try(function, batch)) is None:
            self._halve(min(self.most, len(batch)))
        return results

    def _try(self, function: Callable[[B], R], batch: B) -> list[R] | None:
        """None for want of memory, and not an exception, which would hold the tensors that are in the way."""
        try:
            return [function(piece) for piece in batch.split(self.most)]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        return None

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise ConfigError("not even one image at a time fits into memory", "batch")
        self.most = tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._said:
            self._say(f"out of memory with {tried} images at once: going on with {self.most}, or fewer")
            self._said = True


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
