"""Networks whose CLS reads what it was told to, crafted by hand, and the rows of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.layers import Block
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from dinoreg.models.weights import save_backbone

SIZE, DIM = 32, 64
FLAG = 60.0  # of a kind of token, in a channel of its own; LayerNorm leaves it about 7


def random_network(seed: int = 0, **options: Any) -> VisionTransformer:
    """Width 64, three blocks, weights large enough that attention is not uniform."""
    config = {"embed_dim": DIM, "depth": 3, "num_heads": 4, "patch_size": 8, "image_size": SIZE, "layerscale": 1.0}
    model = build_vit(ModelConfig(**{**config, **options}))
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma"))
            parameter.copy_(torch.randn_like(parameter) * (0.3 if gain or parameter.ndim < 2 else 0.15) + gain)
    return model.eval().requires_grad_(False)


def reading(what: str, registers: int = 2, **options: Any) -> VisionTransformer:
    """A network whose tokens look only at `what` in the last block: registers, patches or cls; or alike at all."""
    model = random_network(num_registers=registers, **options)
    with torch.no_grad():
        _flag(model, {"cls": 0, "registers": 1, "patches": 2}.get(what))
    return model


def _flag(model: VisionTransformer, wanted: int | None) -> None:
    """Channels 0, 1, 2 say what a token is, and the keys of all heads listen to that which is wanted."""
    model.cls_token[..., :3] = torch.tensor([FLAG, 0.0, 0.0])
    if model.register_tokens is not None:
        model.register_tokens[..., :3] = torch.tensor([0.0, FLAG, 0.0])
    assert model.pos_embed is not None
    model.pos_embed[..., :3] = 0
    model.patch_embed.proj.weight[:3] = 0
    model.patch_embed.proj.bias[:3] = torch.tensor([0.0, 0.0, FLAG])  # type: ignore[index]
    for block in model.blocks:
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):  # what a token is stays what it is
            layer.weight[:3] = 0
            layer.bias[:3] = 0
    block.norm1.weight.fill_(1)
    block.norm1.bias.zero_()
    first = torch.arange(0, DIM, DIM // model.num_heads)  # channel of each head
    block.attn.qkv.weight[: 2 * DIM] = 0
    block.attn.qkv.bias[: 2 * DIM] = 0
    block.attn.qkv.bias[first] = 200.0
    if wanted is not None:
        block.attn.qkv.weight[DIM + first, wanted] = 10.0


def pictures(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """(count, 3, size, size), normalised noise."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def write(path: Path, model: VisionTransformer) -> Path:
    """As a file."""
    save_backbone(path, model.state_dict(), model.config, {})
    return path
