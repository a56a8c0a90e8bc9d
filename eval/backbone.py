"""One face for every backbone: what a suite may ask of it, wherever the weights came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dinoreg.models.formats import IMAGENET
from dinoreg.models.maps import query_key_value
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import load_backbone


@dataclass
class Tokens:
    """The tokens of a batch after one block: cls (B, D), registers (B, R, D), patches (B, N, D) row by row.

    grid: the (h, w) of the N patches.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Backbone:
    """A frozen backbone in eval mode. Images are (B, C, H, W), normalised, sides multiples of the patch size.

    Nothing in here is recorded for gradients. Under the caller's autocast it computes in that precision.
    """

    def __init__(self, model: VisionTransformer, name: str = "backbone") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.found, self.step = model.found, model.step
        self.patch_size, self.embed_dim = model.patch_size, model.embed_dim
        self.depth, self.num_heads, self.num_registers = model.depth, model.num_heads, model.num_registers
        self.image_size = model.config.image_size

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Backbone:
        """Move the weights, and return this same backbone."""
        self.model.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.cls_token.device

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and std a channel of images in [0, 1]; ImageNet's where the file does not say."""
        return self.model.normalisation or IMAGENET

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any weight and with what the architecture does with them."""
        config = asdict(self.model.config) | {"init_from": None, "init_from_trusted": False, "drop_path": 0.0}
        seen = hashlib.sha256(json.dumps([config, self.normalisation], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            seen.update(f"{name} {tuple(tensor.shape)}".encode())
            seen.update(tensor.detach().float().cpu().contiguous().numpy())
        return seen.hexdigest()[:16]

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The (h, w) of the patches of such images."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    @torch.no_grad()
    def layers(self, images: Tensor, which: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens after the blocks `which` (indices as into a list), in that order; no block after the last is run.

        norm: through the network's final norm, as its last block's are; otherwise as they stand in the residual
        stream. Raises IndexError for a block that is not there.
        """
        wanted = [range(self.depth)[index] for index in which]
        seen: dict[int, Tensor] = {}
        if wanted:
            stream = self.model.residual_stream(images)
            for done, (x, packing) in zip(range(max(wanted) + 2), stream, strict=False):
                if done - 1 in wanted:
                    seen[done - 1] = packing.split(self.model.norm(x) if norm else x)[0]
        return [self._tokens(seen[index], self.grid(images)) for index in wanted]

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int) -> Tensor:
        """The attention of one block: (B, heads, T, T) with T = 1 + R + N, each row a distribution over the keys."""
        q, k, _ = self.qkv(images, layer)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)

    @torch.no_grad()
    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, ...]:
        """q, k, v of one block, each (B, heads, T, D / heads), biases in, unscaled."""
        return query_key_value(self.model, images, layer)

    @torch.no_grad()
    def patch_embedding(self, images: Tensor) -> Tensor:
        """(B, N, D): the patches as they leave the patch embedding, before positions are added."""
        return self.model.patch_embed(images)

    def _tokens(self, x: Tensor, grid: tuple[int, int]) -> Tokens:
        first = 1 + self.num_registers
        return Tokens(x[:, 0], x[:, 1:first], x[:, first:], grid)


def open_backbone(path: str | Path, *, attention: str = "auto", trust: bool = False) -> Backbone:
    """Open a file, a folder or a run directory (its newest teacher), whatever it is; see `dinoreg.load_backbone`.

    Raises dinoreg.models.formats.WeightsError in one line.
    """
    return Backbone(load_backbone(path, attention=attention, trust=trust), Path(path).name)
