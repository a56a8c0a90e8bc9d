"""What a backbone looks at and where its norms stand out: attention, PCA and norm maps of patches."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class Components(NamedTuple):
    """The strongest principal components of tokens: scores (..., n, k) and shares of the variance (..., k), in fp64.

    Scores have mean 0 and variance 1 and a skew that is not negative (signs of components are arbitrary); beyond the
    rank of the tokens they and the shares are 0.
    """

    scores: Tensor
    shares: Tensor


@torch.no_grad()
def principal_components(tokens: Tensor, count: int = 3) -> Components:
    """Of each set of tokens (..., n, D) by itself."""
    x = tokens.double()
    size = x.square().sum((-2, -1))
    x = x - x.mean(dim=-2, keepdim=True)
    n, dim = x.shape[-2:]
    # The smaller of the two products has the same strengths, and either's directions give the scores.
    product = x @ x.mT if n <= dim else x.mT @ x
    strengths, directions = torch.linalg.eigh(product)
    strengths, directions = strengths.flip(-1)[..., :count], directions.flip(-1)[..., :count]
    scores = directions if n <= dim else x @ directions
    scores = scores / scores.square().mean(dim=-2, keepdim=True).sqrt().clamp(min=1e-300)
    scores = torch.where(scores.pow(3).mean(dim=-2, keepdim=True) < 0, -scores, scores)
    real = strengths > 1e-12 * (size[..., None] + 1e-24)
    scores = torch.where(real[..., None, :], scores, 0.0)
    shares = torch.where(real, strengths / x.square().sum((-2, -1)).clamp(min=1e-300)[..., None], 0.0)
    missing = (0, count - scores.shape[-1])
    return Components(F.pad(scores, missing), F.pad(shares, missing))


def component_colours(scores: Tensor) -> Tensor:
    """Scores of three components (..., 3) as colours in [0, 1], clipped at +-2.3."""
    return (0.5 + scores.clamp(-CLIP, CLIP) / (2 * CLIP)).float()


@torch.no_grad()
def pca_rgb(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components of one image's patches (N, D) as colours (h, w, 3) in [0, 1].

    Components beyond the rank of the features are grey.
    """
    return component_colours(principal_components(patches).scores).unflatten(0, grid)
