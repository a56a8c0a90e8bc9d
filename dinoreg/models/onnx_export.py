"""A backbone as one ONNX graph for any number of images of any size.

Resampling of positions as torch does it has no counterpart in ONNX that gives the same numbers, so it is written out
here as a product with two matrices that are computed from the size of the grid.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dinoreg.models.formats import WeightsError
from dinoreg.models.vit import VisionTransformer

LARGEST = 1_900_000_000  # bytes of weights in the graph's own file, whose format ends at 2 GiB


def write_onnx(model: VisionTransformer, path: Path, mean: list[float], std: list[float]) -> None:
    """Write `path`, and beside it a `.data` file where the weights are too large for one.

    Input: images (batch, C, height, width), normalised, sides multiples of the patch size. Outputs: cls (batch, D),
    registers (batch, R, D) where there are some, patches (batch, N, D). Raises WeightsError without the onnx packages.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise WeightsError(f"{error.name} is not installed: pip install 'dinoreg[onnx]'") from None
    patch, channels = model.patch_size, model.in_channels
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    example = torch.zeros(2, channels, 3 * patch, 2 * patch)  # unlike in every dimension that is to vary
    outputs = ["cls", "registers", "patches"] if model.num_registers else ["cls", "patches"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own insides
        program = torch.onnx.export(
            _Tokens(_resampling_by_matrices(model)),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes={"images": {0: batch, 2: patch * rows, 3: patch * columns}},
        )
    assert program is not None
    said = {"dinoreg.found": model.found, "mean": str(mean), "std": str(std), "patch_size": str(patch)}
    program.model.metadata_props.update(said)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(path, external_data=weights > LARGEST)


class _Tokens(nn.Module):
    """The tokens after the final norm as a tuple, which is what a graph can return."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images)
        registers = [features.registers] if self.model.num_registers else []
        return (features.cls, *registers, features.patches)


class _AnyGrid(VisionTransformer):
    """The same network, whose positions are computed for every grid in one and the same way."""

    def _position(self, pos_embed: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        antialias, offset = self.config.pos_antialias, self.config.pos_offset
        patches = resample_by_matrices(pos_embed[:, 1:], self.grid, grid, antialias=antialias, offset=offset)
        return pos_embed[:, :1], patches


def _resampling_by_matrices(model: VisionTransformer) -> VisionTransformer:
    with torch.device("meta"):
        twin = _AnyGrid(model.config, attention="sdpa", drop_path=False)
    twin.load_state_dict({key: t.detach().float().cpu() for key, t in model.state_dict().items()}, assign=True)
    return twin.eval()


def resample_by_matrices(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool, offset: float = 0.0
) -> Tensor:
    """As `resample_positions`, and unchanged where the grids are the same, without asking whether they are."""
    one = torch.ones((), device=positions.device)  # sizes as tensors: the graph is to compute with them
    moved = [(one * n - o).abs().clamp(max=1) for n, o in zip(new, old, strict=True)]
    if not antialias:  # with it torch lets an axis be that stays as long, without it both are resampled
        moved = [torch.maximum(*moved)] * 2
    rows, columns = (
        _matrix(o, n, o / (one * n + offset * change), antialias)
        for o, n, change in zip(old, new, moved, strict=True)
    )  # fmt: skip
    return torch.einsum("hi,wj,bijd->bhwd", rows, columns, positions.unflatten(1, old)).flatten(1, 2)


def _matrix(old: int, new: int, scale: Tensor, antialias: bool) -> Tensor:
    """(new, old) weights of bicubic resampling along one axis, as `F.interpolate` with align_corners=False has them.

    scale: old samples a new one (a scalar tensor). With antialiasing the kernel is as wide as a new sample, cut off at
    the border and normalised; without, four old samples are weighed and the border is repeated.
    """
    centres = (torch.arange(new, device=scale.device) + 0.5) * scale - 0.5  # in old samples
    samples = torch.arange(old, device=scale.device)
    if antialias:
        weights = _cubic((samples - centres[:, None]) / scale.clamp(min=1), -0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    first, parts = centres.floor(), []
    for step in range(-1, 3):
        sample = first + step
        inside = sample.clamp(0, old - 1)[:, None] == samples
        parts.append(_cubic(centres - sample, -0.75)[:, None] * inside)
    return torch.stack(parts).sum(dim=0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel of cubic convolution with its free parameter a."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
