"""The vision transformer with registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.config import ConfigError
from dinoreg.models.attention import resolve_backend
from dinoreg.models.layers import Block, Mlp, SwiGLU
from dinoreg.models.packing import Packing, draw_kept_rows
from dinoreg.models.rotary import rotations


class Arch(NamedTuple):
    """Size of a transformer."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


ARCHS = {
    "vit_tiny": Arch(192, 12, 3),
    "vit_small": Arch(384, 12, 6),
    "vit_base": Arch(768, 12, 12),
    "vit_large": Arch(1024, 24, 16),
    "vit_huge": Arch(1280, 32, 16),
    "vit_so400m": Arch(1152, 27, 16, 4304 / 1152),  # "shape-optimised" (Alabdulmohsin et al. 2023, arXiv 2305.13035)
    "vit_giant": Arch(1536, 40, 24),
}


@dataclass
class ModelConfig:
    """Architecture of the backbone; student and teacher share it."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_so400m", "vit_giant"] = "vit_small"
    embed_dim: int | None = None  # overrides the width of `arch`
    depth: int | None = None  # overrides the number of blocks of `arch`
    num_heads: int | None = None  # overrides the attention heads of `arch`
    ffn_width: int | None = None  # overrides the hidden width of the feed-forward layers
    patch_size: int = 14
    image_size: int = 224  # pixels; the learnt position grid is image_size / patch_size on each side
    in_channels: int = 3
    num_registers: int = 4
    register_std: float = 1e-6  # of their initial values; DINOv3's is 0.02, with which they part sooner
    ffn: Literal["mlp", "swiglu"] = "mlp"
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # of an mlp; quick_gelu is CLIP's
    pre_norm: bool = False  # a LayerNorm before the first block too, as in CLIP
    norm_eps: float = 1e-6  # of every LayerNorm; CLIP's and DINOv3's is 1e-5
    layerscale: float = 1e-5  # initial gain of each residual branch; 0 leaves LayerScale out
    drop_path: float = 0.0  # share of rows whose residual branch is skipped, student only
    drop_path_shape: Literal["uniform", "linear"] = "uniform"  # same rate in each block, or 0 rising to drop_path
    rope_base: float = 0.0  # longest period of rotary positions, 100 in DINOv3; 0 learns a grid of positions instead
    pos_antialias: bool = True  # resample position embeddings with antialiasing (registers paper, appendix A)
    pos_offset: float = 0.0  # DINOv2 without registers resampled with 0.1
    init_from: str | None = None  # weights to start from: file, Hugging Face folder, timm or DINOv2 state dict
    init_from_trusted: bool = False  # open it even where that may run code of whoever made it

    @property
    def size(self) -> Arch:
        """`arch` with its overrides."""
        base = ARCHS[self.arch]
        return Arch(
            self.embed_dim or base.embed_dim,
            self.depth or base.depth,
            self.num_heads or base.num_heads,
            base.mlp_ratio,
        )

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the feed-forward layers."""
        if self.ffn_width:
            return self.ffn_width
        hidden = round(self.size.embed_dim * self.size.mlp_ratio)
        return SwiGLU.hidden_size(hidden) if self.ffn == "swiglu" else hidden

    def check(self) -> None:
        """Raises ConfigError for what cannot be built."""
        dim, depth, heads, _ = self.size
        if min(dim, depth, heads) < 1:
            raise ConfigError("width, depth and heads must be positive", key="embed_dim")
        if dim % heads:
            raise ConfigError(f"{heads} heads do not divide the width {dim}", key="num_heads")
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(
                f"patches of {self.patch_size} pixels do not tile images of {self.image_size}", key="patch_size"
            )
        if self.rope_base and dim // heads % 4:
            raise ConfigError(f"rotary positions need heads of 4n channels, not {dim // heads}", key="rope_base")
        for key in ("rope_base", "norm_eps", "ffn_width"):
            if (getattr(self, key) or 0) < 0:
                raise ConfigError("cannot be negative", key=key)
        if self.in_channels < 1:
            raise ConfigError("an image has at least one channel", key="in_channels")
        if self.num_registers < 0:
            raise ConfigError("cannot be negative", key="num_registers")
        if self.register_std < 0:
            raise ConfigError("cannot be negative", key="register_std")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"{self.drop_path} is not a share in [0, 1)", key="drop_path")
        if not 0 <= self.pos_offset < 1:
            raise ConfigError(f"{self.pos_offset} is not in [0, 1): DINOv2's is 0.1", key="pos_offset")


@dataclass
class Features:
    """What the backbone says about a batch. Register outputs are used by no loss, but kept for those who look inside.

    cls (B, D), registers (B, R, D), patches (B, N, D), row by row, all after the final norm; prenorm (B, 1 + R + N, D)
    before it, in the order [CLS, registers, patches]; grid: the (h, w) of the N patches.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    prenorm: Tensor
    grid: tuple[int, int]


class PatchEmbed(nn.Module):
    """Each non-overlapping square of pixels, linearly, to a token."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A ViT whose sequence is [CLS, registers, patches] (Vision Transformers Need Registers, section 2.3).

    Registers join after the position embedding was added and have none. `rope_base` turns queries and keys of patches
    by their place instead of adding positions. Images of several sizes pass through in one
    packed sequence, in which each image only sees itself. Construct through `build_vit`.
    """

    # Mean and std a channel that images of [0, 1] were normalised with, where the file it was loaded from says so.
    normalisation: tuple[list[float], list[float]] | None = None
    found: str = ""  # what kind of file it was loaded from and what was in it, in one line
    step: int | None = None  # of the training that wrote the file, where it says so

    def __init__(self, cfg: ModelConfig, *, attention: str = "auto", drop_path: bool = True) -> None:
        super().__init__()
        dim, depth, heads, _ = cfg.size
        self.config = cfg
        self.attention = attention
        self.patch_size = cfg.patch_size
        self.embed_dim, self.depth, self.num_heads = dim, depth, heads
        self.num_registers = cfg.num_registers
        self.in_channels = cfg.in_channels
        self.grid = (cfg.image_size // cfg.patch_size,) * 2
        self.drop_rates = _drop_rates(cfg) if drop_path else [0.0] * depth

        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.in_channels, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        # None rather than an empty tensor: optimisers, checkpoints and sharding all stumble over empty parameters.
        positions = None if cfg.rope_base else torch.empty(1, 1 + self.grid[0] * self.grid[1], dim)
        self.pos_embed = None if positions is None else nn.Parameter(positions)
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, cfg.num_registers, dim)) if cfg.num_registers else None
        self.norm_pre: nn.Module = nn.LayerNorm(dim, eps=cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim, heads, _feed_forward(cfg), cfg.layerscale, cfg.norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=cfg.norm_eps)

    def init_weights(self) -> None:
        """Fill every parameter with DINOv2's initial values, whatever is in it now (also after `to_empty`)."""
        self.patch_embed.proj.reset_parameters()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=self.config.register_std)
        if isinstance(self.norm_pre, nn.LayerNorm):
            self.norm_pre.reset_parameters()
        for block in self.blocks:
            block.init_weights()  # type: ignore[operator]
        self.norm.reset_parameters()

    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        """Features of batches of images of several sizes, in one pass.

        images: each (B_i, C, H_i, W_i), any float dtype, sides multiples of the patch size. masks: each (B_i, N_i)
        bool, True where the patch is replaced by the mask token, or None. generator: draws the rows that drop path
        keeps, here and now, so that recomputation and a second pass with the same seed keep the same.
        """
        x, packing, grids = self.embed(images, masks)
        x = self._through_blocks(x, packing, generator)
        prenorm, normed = packing.split(x), packing.split(self.norm(x))
        return [self._features(*each) for each in zip(prenorm, normed, grids, strict=True)]

    def forward_tokens(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patches: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Class tokens of all images, and the patches of the first batch asked for: what a loss looks at, and no more.

        The last feed-forward and the final norm see these rows alone, a tenth of all in DINOv2's recipes.

        Args:
            patches: int64 (m,), flat positions in the first batch's (B, N).
            images, masks, generator: as in `forward`.

        Returns:
            (sequences, D), batch by batch, and (m, D), both after the final norm.
        """
        x, packing, grids = self.embed(images, masks)
        starts, count = packing.boundaries[:-1], grids[0][0] * grids[0][1]
        places = starts.index_select(0, patches // count) + 1 + self.num_registers + patches % count
        x = self._through_blocks(x, packing, generator, torch.cat([starts, places]))
        cls, chosen = self.norm(x).split([len(starts), len(patches)])
        return cls, chosen

    def _through_blocks(
        self, x: Tensor, packing: Packing, generator: torch.Generator | None, rows: Tensor | None = None
    ) -> Tensor:
        """Packed tokens (T, D) after the last block; only `rows` (m,) of them, if given."""
        rates = self.drop_rates if self.training else [0.0] * self.depth
        *first, last = zip(self.blocks, draw_kept_rows(packing, rates, generator, x.dtype), strict=True)
        backend = self.backend(x)
        for block, kept in first:
            x = block(x, packing, backend, kept)
        block, kept = last
        return block(x, packing, backend, kept, rows)

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """Features of one batch (B, C, H, W); see `forward`."""
        return self([images], [masks])[0]

    def residual_stream(self, images: Tensor) -> Iterator[tuple[Tensor, Packing]]:
        """Packed tokens of one batch and their layout as they enter each block and, last, leave the final one.

        Each is computed when it is asked for, so whoever stops early pays for no more than was seen.
        """
        x, packing, _ = self.embed([images])
        backend = self.backend(x)
        yield x, packing
        for block in self.blocks:
            x = block(x, packing, backend)
            yield x, packing

    def embed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, Packing, list[tuple[int, int]]]:
        """What enters the first block: packed tokens (T, D), their layout, and each batch's grid; see `forward`."""
        grids = [self._grid_of(batch) for batch in images]
        tokens = [self._embed(*each) for each in zip(images, masks or [None] * len(images), grids, strict=True)]
        x = torch.cat([t.flatten(0, 1) for t in tokens])
        turns = self._turns([t.shape[0] for t in tokens], grids, x) if self.config.rope_base else None
        return x, Packing.of([(t.shape[0], t.shape[1]) for t in tokens], x.device, turns), grids

    def backend(self, x: Tensor) -> str:
        """The attention backend for tokens like `x`; see `resolve_backend`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return resolve_backend(self.attention, x.device, dtype, self.embed_dim // self.num_heads)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        _, channels, height, width = images.shape
        if channels != self.in_channels:
            raise ValueError(f"images have {channels} channels, the model takes {self.in_channels}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels are not tiled by patches of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Tokens of one batch (B, 1 + R + N, D)."""
        patches = self.patch_embed(images)
        cls: Tensor = self.cls_token
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token, patches)
        elif self.training:
            # In a step without masks the token's gradient is then zero instead of absent, the same on every rank.
            cls = cls + 0 * self.mask_token
        if self.pos_embed is not None:
            cls_pos, patch_pos = self._position(self.pos_embed, grid)
            cls, patches = cls + cls_pos, patches + patch_pos
        count = patches.shape[0]
        parts = [cls.expand(count, -1, -1), patches]
        if self.register_tokens is not None:
            parts.insert(1, self.register_tokens.expand(count, -1, -1))
        return self.norm_pre(torch.cat(parts, dim=1))

    def _turns(self, counts: Sequence[int], grids: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
        """Rotations (T, 2, head_dim) of all tokens of batches of `counts` images, at least in fp32."""
        before, head_dim = 1 + self.num_registers, self.embed_dim // self.num_heads
        dtype = torch.promote_types(x.dtype, torch.float32)
        tables = [rotations(grid, before, head_dim, self.config.rope_base, x.device, dtype) for grid in grids]
        return torch.cat([table.repeat(count, 1, 1) for table, count in zip(tables, counts, strict=True)])

    def _position(self, pos_embed: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position embeddings of CLS (1, 1, D) and of a grid of patches (1, h * w, D)."""
        cls_pos, patch_pos = pos_embed[:, :1], pos_embed[:, 1:]
        if grid != self.grid:
            patch_pos = resample_positions(
                patch_pos, self.grid, grid, antialias=self.config.pos_antialias, offset=self.config.pos_offset
            )
        return cls_pos, patch_pos

    def _features(self, prenorm: Tensor, normed: Tensor, grid: tuple[int, int]) -> Features:
        first = 1 + self.num_registers
        return Features(normed[:, 0], normed[:, 1:first], normed[:, first:], prenorm, grid)


def build_vit(cfg: ModelConfig, *, attention: str = "auto", drop_path: bool = True) -> VisionTransformer:
    """A network of this architecture with uninitialised weights: call `init_weights` or load some.

    Under `torch.device("meta")` it takes no memory. drop_path=False builds the teacher.
    """
    cfg.check()
    return VisionTransformer(cfg, attention=attention, drop_path=drop_path)


def resample_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool, offset: float = 0.0
) -> Tensor:
    """Position embeddings (1, h * w, D) of one grid, for another one, bicubically and in fp32.

    With an offset the grids are related by the factor (new + offset) / old instead of new / old. It was meant against
    rounding, and DINOv2's models without registers were trained and are used with 0.1 (and without antialiasing).
    """
    image = positions.float().unflatten(1, old).permute(0, 3, 1, 2)
    where: dict[str, tuple[float, ...]] = (
        {"scale_factor": tuple((n + offset) / o for n, o in zip(new, old, strict=True))} if offset else {"size": new}
    )
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=antialias, **where)  # type: ignore[arg-type]
    if image.shape[-2:] != new:
        raise ValueError(f"pos_offset {offset} makes a grid of {tuple(image.shape[-2:])} instead of {new}: choose less")
    return image.flatten(2).transpose(1, 2).to(positions.dtype)


def _feed_forward(cfg: ModelConfig) -> Mlp | SwiGLU:
    if cfg.ffn == "swiglu":
        return SwiGLU(cfg.size.embed_dim, cfg.ffn_hidden)
    return Mlp(cfg.size.embed_dim, cfg.ffn_hidden, quick=cfg.activation == "quick_gelu")


def _drop_rates(cfg: ModelConfig) -> list[float]:
    """Drop path's rate in each block."""
    depth = cfg.size.depth
    if cfg.drop_path_shape == "uniform" or depth == 1:
        return [cfg.drop_path] * depth
    return [cfg.drop_path * block / (depth - 1) for block in range(depth)]
