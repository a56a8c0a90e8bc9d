"""Training images in random crops, by number: nothing has a state, so a killed training goes on as if never stopped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinoreg.data.counter import Purpose, generator, make_key, permute
from dinoreg.data.crops import CropConfig, draw_boxes, resize_box
from dinoreg.data.images import BadImage
from dinoreg.parallel.mesh import Ranks
from eval.images import Part

SCALE = (0.08, 1.0)  # shares of the area, torchvision's default


class Order:
    """An endless shuffled sequence over `count` images: every one once a pass, each pass in another order."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def place(self, number: int) -> int:
        """Which image is the number-th."""
        epoch, turn = divmod(number, self.count)
        return permute(turn, self.count, make_key(self.seed, epoch))


class Augmented(Dataset[tuple[Tensor, int, int]]):
    """Random resized crops with flips (aspects of 3/4 to 4/3), bicubic. number -> pixels, label, place in the part.

    An image that cannot be read is black and has the label -1.
    """

    def __init__(self, part: Part, size: int, seed: int) -> None:
        self.part, self.size, self.seed = part, size, seed
        self.order = Order(len(part), seed)
        self._crop = CropConfig(global_size=size, global_scale=SCALE, local_count=0)

    def __getitem__(self, number: int) -> tuple[Tensor, int, int]:
        place = self.order.place(number)
        row = int(self.part.rows[place])
        try:
            return self._cut(row, number), int(self.part.images.labels[row]), place
        except BadImage:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1, place

    def _cut(self, row: int, number: int) -> Tensor:
        """uint8 (3, size, size)."""
        pixels = self.part.images.read(row)
        drawn = draw_boxes(self._crop, generator(self.seed, Purpose.CROP, number), pixels.shape[2], pixels.shape[1])
        crop = resize_box(pixels, drawn.boxes[0].tolist(), self.size)
        return crop.flip(-1) if drawn.flips[0] else crop


def numbers_of(start: int, steps: int, batch: int, ranks: Ranks) -> list[range]:
    """The sample numbers of this rank's share of each step's batch, from step `start` on."""
    share = batch // ranks.world
    firsts = (step * batch + ranks.rank * share for step in range(start, steps))
    return [range(first, first + share) for first in firsts]
