"""Backbones in files: write one that needs nothing beside it, open one from anywhere, start a model from one."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.models.adapt import adapt
from dinoreg.models.formats import Weights, WeightsError, convert, depth_of, infer_config
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit

METADATA_KEY = "dinoreg.model"
NORMALISATION_KEY = "dinoreg.normalisation"  # [mean, std] of the training images


def save_backbone(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, extra: Mapping[str, str] | None = None
) -> None:
    """Write a backbone's full state dict and its architecture, and `extra` remarks, to one safetensors file.

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = asdict(replace(config, init_from=None, init_from_trusted=False))
    metadata = {**(extra or {}), "format": "pt", METADATA_KEY: json.dumps(own)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in state.items()}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the final name
        partial.chmod(0o644)  # the library makes files that colleagues cannot read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_backbone(
    path_or_name: str | Path, *, device: str | torch.device = "cpu", attention: str = "auto", trust: bool = False
) -> VisionTransformer:
    """Open a backbone in fp32 and eval mode.

    path_or_name: a file written by `save_backbone`; a DINOv2, DINO or timm state dict (.pth, .safetensors); a
    checkpoint that holds a teacher; a run directory, whose newest teacher is taken; a Hugging Face folder of the
    dinov2 or dinov2_with_registers kind; or `hf:ORG/NAME`. Positions are resampled as the source's own code does.
    Raises WeightsError in one line.

    trust: open a pickled file that holds more than tensors and plain values, which lets it run any code of its maker's.
    """
    weights = read_weights(path_or_name, trust)
    with _naming(path_or_name):
        config = infer_config(weights)
        with torch.device("meta"):
            model = build_vit(config, attention=attention, drop_path=False)
        # Only unmasked images are run through a loaded backbone, so files without a mask token are complete.
        state = {"mask_token": torch.zeros(1, config.size.embed_dim), **weights.state}
        _demand_same_keys(model, state)
        model.load_state_dict({k: t.float() for k, t in state.items()}, assign=True)
        model.normalisation, model.step = weights.normalisation, weights.step
        model.found = describe(weights, config)
    return model.to(device).eval()


@dataclass
class InitReport:
    """What became of each key when a model started from a file. `share` is that of parameters with a source."""

    source: str
    taken: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    share: float = 0.0

    def __str__(self) -> str:
        lines = [f"started from {self.source}: {self.share:.2%} of the parameters have a source"]
        lines += [f"  taken    {key}" for key in compact(self.taken)]
        lines += [f"  adapted  {key}: {how}" for key, how in _compact_adapted(self.adapted)]
        lines += [f"  missing  {key}: keeps its fresh initialisation" for key in compact(self.missing)]
        lines += [f"  unused   {key}" for key in compact(self.unused)]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


@torch.no_grad()
def initialise(model: VisionTransformer, path: str | Path, trust: bool = False) -> InitReport:
    """Start `model`, whose weights are initialised and not sharded, from a file of any kind `load_backbone` opens.

    Position grid, patch size, input channels, number of registers and presence of LayerScale may differ and are
    adapted (see `dinoreg.models.adapt`). trust: as in `load_backbone`. Raises WeightsError when depth or width differ
    or when less than 95 % of the parameters find a source: the model would otherwise train from scratch unnoticed.
    """
    weights = read_weights(path, trust)
    with _naming(path):
        _demand_same_size(model, weights)
        state, how = adapt(weights, model)
        report = InitReport(f"{path} ({weights.kind})", unused=list(weights.unused))
        own = dict(model.named_parameters())
        for name, parameter in own.items():
            if name not in state:
                report.missing.append(name)
                continue
            if state[name].shape != parameter.shape:
                raise WeightsError(f"{name} is {_shape(state[name])} there, {_shape(parameter)} in the model")
            parameter.copy_(state[name])
            if name in how:
                report.adapted[name] = how[name]
            else:
                report.taken.append(name)
        report.unused += [name for name in state if name not in own]
        report.notes = _differences(model.config, weights)
        total = sum(p.numel() for p in own.values())
        report.share = 1 - sum(own[name].numel() for name in report.missing) / total
        if report.share < 0.95:
            raise WeightsError(
                f"only {report.share:.1%} of the model's parameters are in it; missing: "
                f"{', '.join(compact(report.missing)[:5])}"
            )
    return report


def read_weights(path_or_name: str | Path, trust: bool = False) -> Weights:
    """Parameters under this project's names from any file or folder that `load_backbone` accepts."""
    path = _download(str(path_or_name)[3:]) if str(path_or_name).startswith("hf:") else Path(path_or_name)
    with _naming(path_or_name):
        if (path / "teacher").is_dir():
            path = newest_teacher(path)
        if path.is_dir():
            return _read_folder(path, trust)
        if not path.is_file():
            raise WeightsError("no such file or folder (models on the Hugging Face hub are written hf:ORG/NAME)")
        checkpoint, metadata = _read_file(path, trust)
        if METADATA_KEY in metadata:
            return _own_weights(checkpoint, metadata)
        return convert(checkpoint)


def newest_teacher(run_dir: Path) -> Path:
    """The teacher's backbone after the most steps in a run directory. Raises WeightsError where there is none yet."""
    found = sorted((run_dir / "teacher").glob("step_*.safetensors"))
    if not found:
        raise WeightsError("a run that has written no teacher yet (checkpoint.every says when it does)")
    return found[-1]


def describe(weights: Weights, config: ModelConfig) -> str:
    """Format, architecture and what the source leaves out or does in its own way, in one line."""
    dim, depth, heads, _ = config.size
    unsaid = (config.embed_dim, config.depth, config.num_heads) != (None, None, None)
    size = f"{depth} blocks of width {dim}, {heads} heads" if unsaid else config.arch
    resampling = "with" if config.pos_antialias else "without"
    parts = [
        f"{weights.kind}: {size}",
        f"patches of {config.patch_size} at {config.image_size} pixels",
        f"{config.num_registers} registers",
        f"{config.ffn} feed-forward",
        f"positions resampled {resampling} antialiasing, offset {config.pos_offset:g}",
    ]
    return ", ".join(parts)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file's name in front of every WeightsError from inside.

    Names and shapes of a strange file can go wrong in as many ways as there are lines that use them: all are one.
    """
    try:
        yield
    except WeightsError as error:
        named = str(error).startswith(str(path))
        raise WeightsError(str(error) if named else f"{path}: {error}") from error.__cause__
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        kind = type(error).__name__
        raise WeightsError(f"{path}: of no known architecture ({kind}: {_first_line(error)})") from error


def _own_weights(state: dict[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    try:
        config = ModelConfig(**json.loads(metadata[METADATA_KEY]))
        config.check()
    except (TypeError, ValueError) as error:
        raise WeightsError(f"written by another version of dinoreg ({error})") from None
    if config.size.depth != depth_of(state):
        raise WeightsError(f"has {depth_of(state)} blocks, by its own account {config.size.depth}")
    normalisation = json.loads(metadata.get(NORMALISATION_KEY, "null"))
    return Weights(
        state,
        "dinoreg",
        config.pos_antialias,
        config.pos_offset,
        heads=config.size.num_heads,
        config=config,
        normalisation=tuple(normalisation) if normalisation else None,
        step=int(metadata["step"]) if metadata.get("step", "").isdigit() else None,
    )


def _read_file(path: Path, trust: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Contents and metadata of one file; the kind is told from its first bytes, since endings are used freely."""
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
        # Old DINO checkpoints carry their command line; a Namespace of plain values is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(str(error))) from error
    except (ImportError, AttributeError) as error:
        raise WeightsError(f"needs code that is not installed here ({_first_line(error)})") from error
    # torch's reader takes any bytes for instructions, so what fails in it may be anything.
    except Exception as error:
        raise WeightsError(f"truncated or damaged ({_first_line(error)})") from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"holds a {type(checkpoint).__name__}, not a state dict")
    return dict(checkpoint), {}


def _refusal(message: str) -> str:
    """Why torch would not open a file, without its advice."""
    if "truncated" in message:
        return "truncated"
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted is None:
        return "no checkpoint"
    return (
        f"would run code when opened: it asks for {wanted.group(1)}; if you trust whoever made it, pass trust=True to "
        "load_backbone, or set model.init_from_trusted=true for a run"
    )


def _read_folder(folder: Path, trust: bool) -> Weights:
    config_file, index = folder / "config.json", folder / "model.safetensors.index.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    kind = config.get("model_type", "dinov2")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise WeightsError(f"a Hugging Face model of the kind {kind}: only dinov2 and dinov2_with_registers fit")
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        candidates = ("model.safetensors", "pytorch_model.bin")
        names = [name for name in candidates if (folder / name).is_file()][:1]
    if not names:
        raise WeightsError("a folder without model.safetensors or pytorch_model.bin")
    checkpoint: dict[str, Any] = {}
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"model.safetensors.index.json names {name}, which lies elsewhere")
        checkpoint.update(_read_file(folder / name, trust)[0])
    return convert(checkpoint, config)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise WeightsError(f"hf:{name}: huggingface_hub is not installed (pip install huggingface_hub)") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*", "pytorch_model.bin"]))
    except Exception as error:  # the hub's errors have no common class, and any of them is the user's to read
        raise WeightsError(f"hf:{name}: {_first_line(error)}") from error


def _demand_same_keys(model: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    if missing := expected.keys() - state.keys():
        raise WeightsError(f"incomplete: without {', '.join(compact(sorted(missing))[:5])}")
    if strange := state.keys() - expected.keys():
        raise WeightsError(f"an unknown architecture: what is {', '.join(compact(sorted(strange))[:5])}?")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise WeightsError(f"{key} is {_shape(state[key])}, {_shape(tensor)} was expected")


def _demand_same_size(model: VisionTransformer, weights: Weights) -> None:
    width, depth = weights.state["patch_embed.proj.weight"].shape[0], depth_of(weights.state)
    for what, theirs, own in (
        ("width", width, model.embed_dim),
        ("depth", depth, model.depth),
        ("number of heads", weights.heads or model.num_heads, model.num_heads),
    ):
        if theirs != own:
            raise WeightsError(f"its {what} is {theirs}, the model's is {own}: choose model.arch to fit")


def _differences(config: ModelConfig, weights: Weights) -> list[str]:
    if (weights.antialias, weights.offset) == (config.pos_antialias, config.pos_offset):
        return []
    return [
        f"the source resamples positions with antialias={weights.antialias}, offset={weights.offset}, this model with "
        f"antialias={config.pos_antialias}, offset={config.pos_offset}: other than native sizes differ slightly"
    ]


def compact(keys: list[str]) -> list[str]:
    """The keys with blocks taken together: `blocks.{0-11}.attn.qkv.weight`."""
    blocks: dict[str, list[int]] = {}
    for key in keys:
        first, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if first == "blocks" and number.isdigit():
            blocks.setdefault(f"blocks.{{}}.{name}", []).append(int(number))
        else:
            blocks[key] = []
    return [key.replace("{}", f"{{{_ranges(found)}}}") if found else key for key, found in blocks.items()]


def _compact_adapted(adapted: Mapping[str, str]) -> list[tuple[str, str]]:
    reasons = dict.fromkeys(adapted.values())
    return [(key, how) for how in reasons for key in compact([k for k, h in adapted.items() if h == how])]


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
