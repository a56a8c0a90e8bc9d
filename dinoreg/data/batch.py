"""What the host hands to the device (`Batch`) and what the objective receives (`Crops`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dinoreg.data.progress import ShardDone


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used and was replaced by another one."""

    reason: str  # one of dinoreg.data.images.REASONS
    source: str  # the shard, folder or URL
    key: str  # the member or file inside it

    def __str__(self) -> str:
        return f"{self.reason}: {self.key} in {self.source}"


@dataclass
class Batch:
    """The crops of one rank's share of a step, as the workers made them.

    global_crops: uint8 (B, 2, C, Hg, Wg); local_crops: uint8 (B, L, C, Hl, Wl); both as resizing leaves them, channels
    of a pixel side by side in memory, but any strides will do; photometric: float32 (B, 2 + L, P), the columns of
    `dinoreg.data.photometric`; masks: bool (B, 2, N), True = hidden from the student; positions: int64 (B,), the global
    sample numbers; keys: (shard or folder, key) of each row; shards_done: what of streams is done once this batch is
    trained on. Only the crops move to the device by `to`: `develop` looks up on the host which rows an operation
    concerns and which patches are masked, so that the device is never waited for.
    """

    global_crops: Tensor
    local_crops: Tensor
    photometric: Tensor
    masks: Tensor
    positions: Tensor
    bad: list[BadSample] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    shards_done: list[ShardDone] = field(default_factory=list)

    def __len__(self) -> int:
        return self.global_crops.shape[0]

    def pin_memory(self) -> Batch:
        """Copies into page-locked memory (DataLoader calls this by its name)."""
        return replace(
            self,
            global_crops=self.global_crops.pin_memory(),
            local_crops=self.local_crops.pin_memory(),
            photometric=self.photometric.pin_memory(),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its crops on `device`."""
        return replace(
            self,
            global_crops=self.global_crops.to(device, non_blocking=non_blocking),
            local_crops=self.local_crops.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that `stream` uses the tensors, which another stream has filled."""
        for tensor in (self.global_crops, self.local_crops):
            tensor.record_stream(stream)

    def split(self, parts: int) -> list[Batch]:
        """`parts` equal contiguous parts (views); what belongs to no row goes with the first. Raises ValueError."""
        if parts < 1 or len(self) % parts:
            raise ValueError(f"a batch of {len(self)} images cannot be split into {parts} equal parts")
        tensors = (self.global_crops, self.local_crops, self.photometric, self.masks, self.positions)
        columns = [tensor.chunk(parts) for tensor in tensors]
        pieces = [Batch(*piece) for piece in zip(*columns, strict=True)]
        pieces[0].bad, pieces[0].shards_done = self.bad, self.shards_done
        for number, piece in enumerate(pieces):
            piece.keys = self.keys[number * len(piece) : (number + 1) * len(piece)]
        return pieces


@dataclass
class Crops:
    """Augmented, normalised crops on the device.

    global_crops: float32 (b, 2, C, H, W); local_crops: float32 (b, L, C, h, w); masks: bool (b, 2, N), True = hidden
    from the student; masked_index: int64 (m,), where `masks` is True, as rising positions in its b * 2 * N entries.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    masked_index: Tensor
