"""What a backbone looks at and where its norms stand out: attention, PCA and norm maps of patches."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from dinoreg.models.layers import Block
from dinoreg.models.vit import VisionTransformer

CLIP = 2.3  # standard deviations of a principal component that the colours span


@torch.no_grad()
def attention_rows(model: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Attention of CLS and of each register over all tokens in one block: (B, 1 + R, heads, 1 + R + N), fp32.

    Recomputed from the block's input, because the kernels used in training return no weights; only these rows of the
    matrix are made. images: (B, C, H, W); block: an index as into a list. The model must be whole on this device.
    """
    q, k, _ = query_key_value(model, images, block)
    q, k = q.float(), k.float()
    q = q[:, :, : 1 + model.num_registers] / q.shape[-1] ** 0.5
    return torch.einsum("bhqd,bhkd->bqhk", q, k).softmax(dim=-1)


@torch.no_grad()
def query_key_value(model: VisionTransformer, images: Tensor, block: int = -1) -> tuple[Tensor, ...]:
    """What attention compares and mixes in one block: q, k, v, each (B, heads, 1 + R + N, head_dim).

    With their biases, turned where positions are rotary, unscaled. images: (B, C, H, W); block: an index as into a
    list. Raises IndexError beyond it.
    """
    index = range(model.depth)[block]
    last = model.blocks[index]
    assert isinstance(last, Block)
    x, packing = next(islice(model.residual_stream(images), index, None))
    parts = last.attn.query_key_value(last.norm1(x), packing)
    return tuple(packing.split(part)[0].transpose(1, 2) for part in parts)


def attention_maps(model: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Attention of CLS (first) and of each register over the patches: (B, 1 + R, heads, h, w), see `attention_rows`.

    What a map lacks to a sum of 1 went to CLS and the registers.
    """
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    return attention_rows(model, images, block)[..., 1 + model.num_registers :].unflatten(-1, grid)


@torch.no_grad()
def patch_norms(model: VisionTransformer, images: Tensor) -> Tensor:
    """L2 norm of each patch token before the final norm, which would hide outliers: (B, h, w), fp32."""
    features = model.forward_features(images)
    return features.prenorm[:, 1 + model.num_registers :].float().norm(dim=-1).unflatten(-1, features.grid)


@torch.no_grad()
def pca_rgb(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components of one image's patches (N, D) as colours (h, w, 3) in [0, 1].

    Each component is scaled by its own standard deviation, turned so that its skew is positive (signs of components
    are arbitrary), and clipped at +-2.3. Components beyond the rank of the features are grey.
    """
    centred = patches.double() - patches.double().mean(dim=0)
    _, strength, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred.new_zeros(len(centred), 3)
    rank = min(3, int((strength > 1e-6 * (patches.double().norm() + 1e-12)).sum()))
    found = centred @ directions[:rank].T
    found = found / found.square().mean(dim=0).sqrt()
    turned = torch.where(found.pow(3).mean(dim=0) < 0, -found, found)
    scores[:, :rank] = turned
    return (0.5 + scores.clamp(-CLIP, CLIP) / (2 * CLIP)).float().unflatten(0, grid)
