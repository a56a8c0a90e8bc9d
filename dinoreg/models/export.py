"""A backbone written as other libraries read it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.models.files import naming_a_full_disk
from dinoreg.models.foreign import dino, huggingface, timm
from dinoreg.models.formats import IMAGENET, WeightsError
from dinoreg.models.onnx_export import write_onnx
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import NORMALISATION_KEY, save_backbone

FOLDERS = ("hf", "timm")  # the other formats are files


def export(model: VisionTransformer, kind: str, output: Path, overwrite: bool = False) -> list[str]:
    """Write `model` as safetensors, dinov2, hf, timm or onnx to `output`, a file or folder that appears when complete.

    Returns what the receiving library does otherwise than this one, in words. Raises WeightsError where the format
    cannot hold this network or `output` is not free.
    """
    demand_free(output, kind, overwrite)
    with torch.no_grad(), naming_a_full_disk(output), _appearing(output, kind in FOLDERS) as place:
        return _write(model, kind, place)


def demand_free(output: Path, kind: str, overwrite: bool) -> None:
    """Raises WeightsError where something would be overwritten unasked, or a folder by a file."""
    if output.exists() and output.is_dir() != (kind in FOLDERS):
        raise WeightsError(f"{output} is a {'folder' if output.is_dir() else 'file'}, which the format {kind} is not")
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not overwrite:
        raise WeightsError(f"{output} exists: name another with --output, or pass --overwrite")


def _write(model: VisionTransformer, kind: str, place: Path) -> list[str]:
    mean, std = model.normalisation or IMAGENET
    if kind == "safetensors":
        extra = {NORMALISATION_KEY: json.dumps(model.normalisation)} if model.normalisation else {}
        extra |= {"step": str(model.step)} if model.step is not None else {}
        save_backbone(place, model.state_dict(), model.config, extra)
        return []
    if kind == "onnx":
        write_onnx(model, place, mean, std)
        return []
    if kind == "dinov2":
        state, notes = dino.write_dinov2(model)
        if (mean, std) != IMAGENET:
            notes.append(f"the file does not say that images are normalised with mean {mean}, std {std}")
        torch.save(_own(state), place)
        return notes
    if kind == "timm":
        state, config, notes = timm.write(model, mean, std)
        _write_folder(place, state, {"config.json": config})
        return notes
    state, config, notes = huggingface.write(model)
    _write_folder(place, state, {"config.json": config, "preprocessor_config.json": _preprocessor(model, mean, std)})
    return notes


def _write_folder(folder: Path, state: Mapping[str, Tensor], configs: Mapping[str, Any]) -> None:
    save_file(_own(state), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library makes files that colleagues cannot read
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which formats of files do not allow, and hold no more than they show."""
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}


def _preprocessor(model: VisionTransformer, mean: list[float], std: list[float]) -> dict[str, Any]:
    """How transformers is to prepare images: as ImageNet is evaluated, the centre of 8/7 of the size."""
    size = model.config.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size * 8 // 7},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


@contextmanager
def _appearing(output: Path, folder: bool) -> Iterator[Path]:
    """A place to write to; what lies there in the end, under `output`'s name and beside it, is moved to `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        place = Path(scratch) / output.name
        if folder:
            place.mkdir()
        yield place
        target = output if folder else output.parent
        target.mkdir(exist_ok=True)
        for written in sorted((place if folder else Path(scratch)).iterdir()):
            shutil.move(written, target / written.name)
