"""What a backbone sees in a few photos, and what it was fed, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinoreg.data.batch import Crops
from dinoreg.data.images import BadImage, open_picture
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.maps import attention_maps, patch_norms, pca_rgb
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import load_backbone

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Photo = str | Path | Image.Image | Tensor  # a tensor is uint8 (C, H, W)

FINEST_GRID = 24  # patches along the short side of a photo that is looked at: maps of 8 x 8 show nothing
CELL = 1.9  # inches
CROPS_SHOWN = 6  # images on a contact sheet


def look(
    model: VisionTransformer | str | Path,
    photos: Sequence[Photo],
    out: str | Path,
    photometric: PhotometricConfig | None = None,
    size: int | None = None,
) -> Path:
    """Draw what the last block does with each photo, one row a photo, into the PNG file `out`.

    Columns: the photo; the attention of CLS and of each register to the patches (mean over heads); the first three
    principal components of the patch features as colours; the norms of the patch tokens before the final norm.

    Args:
        model: a backbone, or what `load_backbone` takes.
        photos: paths, Pillow images or uint8 tensors (C, H, W). Their aspect is kept.
        photometric: holds the mean and std to normalise with (default: as the weights say, or ImageNet's).
        size: pixels of the short side; by default the training size, and at least FINEST_GRID patches.
    """
    if not isinstance(model, VisionTransformer):
        model = load_backbone(model)
    normalise = photometric or _normalisation_of(model)
    side = size or max(model.grid[0], FINEST_GRID) * model.patch_size
    rows = [_Row(model, _prepare(photo, model, side), _name(photo), normalise) for photo in photos]
    figure, grid = _figure(rows, columns=2 + model.num_registers + 2)
    for number, row in enumerate(rows):
        row.draw([figure.add_subplot(grid[number, column]) for column in range(grid.ncols)], titled=number == 0)
    figure.text(
        0.3 / figure.get_figwidth(), 1 - 0.08 / figure.get_figheight(), _describe(model, rows), va="top", fontsize=9
    )
    return _save(figure, out)


class _Row:
    """The maps of one photo uint8 (C, H, W)."""

    def __init__(self, model: VisionTransformer, pixels: Tensor, name: str, photometric: PhotometricConfig) -> None:
        self.pixels, self.name = pixels, name
        self.height, self.width = pixels.shape[1:]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (photometric.mean, photometric.std))
        images = ((pixels.float() / 255 - mean) / std)[None].to(model.cls_token.device)
        with torch.no_grad():
            features = model.forward_features(images)
            self.attention = attention_maps(model, images)[0].float().mean(1).cpu()  # (1 + R, h, w)
            self.norms = patch_norms(model, images)[0].float().cpu()
            self.colours = np.asarray(pca_rgb(features.patches[0], features.grid).float().cpu())
        self.register_norms = features.prenorm[0, 1 : 1 + model.num_registers].float().norm(dim=1).tolist()

    def draw(self, axes: Sequence[Axes], titled: bool) -> None:
        """Fill one row of axes, the last of which is for the colour bar; the first row has the titles."""
        photo, *attention, colours, norms, bar = axes
        photo.imshow(_viewable(self.pixels))
        photo.set_ylabel(self.name, fontsize=9)
        for axis, weights in zip(attention, self.attention, strict=True):
            # A few patches may take so much that all others would be black.
            axis.imshow(weights.numpy(), cmap="magma", vmax=float(weights.quantile(0.99)))
            low, high = (weights.min() * weights.numel(), weights.max() * weights.numel())
            axis.set_xlabel(f"{low:.2g} to {high:.2g} × uniform\n{weights.sum():.0%} on patches", fontsize=7)
        colours.imshow(self.colours)
        drawn = norms.imshow(self.norms.numpy(), cmap="viridis")
        norms.figure.colorbar(drawn, cax=bar).ax.tick_params(labelsize=7)
        outliers = (self.norms > self.norms.mean() + 3 * self.norms.std(correction=0)).float().mean()
        norms.set_xlabel(
            f"median {self.norms.median():.3g}, max {self.norms.max():.3g}\n{outliers:.1%} above mean + 3 std",
            fontsize=7,
        )
        for axis in axes[:-1]:
            axis.set_xticks([])
            axis.set_yticks([])
        if titled:
            registers = [f"register {i}" for i in range(len(attention) - 1)]
            titles = ["photo", "CLS attention", *registers, "PCA of patches", "patch norms"]
            for axis, title in zip(axes[:-1], titles, strict=True):
                axis.set_title(title, fontsize=9)


def crops_picture(crops: Crops, photometric: PhotometricConfig, out: str | Path) -> Path:
    """A contact sheet of augmented crops as the networks get them: one row an image, masked patches greyed out."""
    shown = min(CROPS_SHOWN, len(crops.global_crops))
    local = crops.local_crops.shape[1]
    views = [_restore(crops.global_crops[:shown], photometric), _restore(crops.local_crops[:shown], photometric)]
    views[0] = _grey_out(views[0], crops.masks[:shown].cpu())

    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * (2 + local) + 0.2, 1.3 * shown + 0.5), layout="constrained")
    axes = figure.subplots(shown, 2 + local, squeeze=False)
    for row in range(shown):
        for column, axis in enumerate(axes[row]):
            axis.imshow(_viewable(views[0][row, column] if column < 2 else views[1][row, column - 2]))
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"global {column}" if column < 2 else f"local {column - 2}", fontsize=8)
    return _save(figure, out)


def _restore(crops: Tensor, photometric: PhotometricConfig) -> Tensor:
    """Normalised crops (b, n, C, H, W) as uint8 on the host."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (photometric.mean, photometric.std))
    return ((crops.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _grey_out(crops: Tensor, masks: Tensor) -> Tensor:
    """Crops (b, 2, C, H, W) with the patches in `masks` (b, 2, N) faded to grey."""
    side = round(masks.shape[-1] ** 0.5)  # crops are square
    hidden = masks.unflatten(-1, (side, side)).float()
    hidden = F.interpolate(hidden, size=crops.shape[-2:], mode="nearest")[:, :, None]
    return (crops * (1 - 0.85 * hidden) + 0.85 * 128 * hidden).to(torch.uint8)


def _prepare(photo: Photo, model: VisionTransformer, side: int) -> Tensor:
    """A photo as uint8 (C, H, W), its short side about `side` pixels, both sides multiples of the patch size."""
    if isinstance(photo, str | Path):
        try:
            pixels = open_picture(Path(photo).read_bytes(), model.in_channels).decode()
        except BadImage as error:
            raise ValueError(f"{photo}: {error.reason}") from error
    elif isinstance(photo, Image.Image):
        pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)
    else:
        pixels = photo.cpu()
    height, width = pixels.shape[1:]
    scale = side / min(height, width)
    target = [max(1, round(length * scale / model.patch_size)) * model.patch_size for length in (height, width)]
    return F.interpolate(pixels[None], size=target, mode="bicubic", antialias=True)[0]


def _normalisation_of(model: VisionTransformer) -> PhotometricConfig:
    """What the backbone's file says, or else ImageNet's."""
    if model.normalisation is not None:
        return PhotometricConfig(mean=model.normalisation[0], std=model.normalisation[1])
    if model.in_channels != 3:
        raise ValueError(f"the weights do not say how their images of {model.in_channels} channels were normalised")
    return PhotometricConfig()


def _name(photo: Photo) -> str:
    return Path(photo).stem if isinstance(photo, str | Path) else ""


def _viewable(pixels: Tensor) -> NDArray[np.uint8]:
    """uint8 (C, H, W) as something imshow takes: RGB of the first three channels, or grey of the first."""
    chosen = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return chosen.permute(1, 2, 0).numpy()


def _describe(model: VisionTransformer, rows: Sequence[_Row]) -> str:
    text = (
        f"ViT of width {model.embed_dim} and depth {model.depth}, patches of {model.patch_size} pixels, "
        f"{model.num_registers} registers; last block, mean over {model.num_heads} heads"
    )
    if model.num_registers:
        norms = np.mean([row.register_norms for row in rows], axis=0)
        text += "; register norms " + ", ".join(f"{norm:.3g}" for norm in norms)
    return text


def _figure(rows: Sequence[_Row], columns: int) -> tuple[Figure, Any]:
    """A figure with a grid whose rows are as high as their photos are, and a narrow last column for colour bars."""
    from matplotlib.figure import Figure  # half a second of import, which training without pictures need not pay

    heights = [row.height / row.width for row in rows]
    inches = (CELL * columns + 0.9, CELL * sum(heights) + 0.5 * len(rows) + 0.6)
    figure = Figure(figsize=inches)
    left, right, top, bottom = 0.3 / inches[0], 1 - 0.45 / inches[0], 1 - 0.55 / inches[1], 0.45 / inches[1]
    between = 0.5 * len(rows) / sum(heights) / CELL
    grid = figure.add_gridspec(
        len(rows), columns + 1, left=left, right=right, top=top, bottom=bottom, wspace=0.06, hspace=between,
        height_ratios=heights, width_ratios=[1.0] * columns + [0.05],
    )  # fmt: skip
    return figure, grid


def _save(figure: Figure, out: str | Path) -> Path:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")  # a Figure of its own draws with Agg and needs no display
    return path
