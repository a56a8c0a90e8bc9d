"""Backbones in files: write one that needs nothing beside it, open one from anywhere, start a model from one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.models.adapt import adapt
from dinoreg.models.files import download, first_line, naming_a_full_disk, open_path
from dinoreg.models.foreign.detect import convert
from dinoreg.models.formats import Weights, WeightsError, depth_of, describe, infer_config
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
        with naming_a_full_disk(path):
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

    path_or_name: a file written by `save_backbone`; a run directory, whose newest teacher is taken; a checkpoint or
    state dict of DINO, iBOT, DeiT, DeiT-III, DINOv2, DINOv3, timm or OpenCLIP (.pth, .safetensors); a folder of one
    of them or of Hugging Face's Dinov2, Dinov2WithRegisters, ViT, CLIP or DINOv3 ViT; or `hf:ORG/NAME`. The kind is
    told by names and shapes; `found` of the network says it in a line. Positions are resampled as the source's own
    code does. Raises WeightsError in one line.

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
                f"only {report.share:.1%} of the model's parameters are in it; missing: {_listed(report.missing)}"
            )
    return report


def read_weights(path_or_name: str | Path, trust: bool = False) -> Weights:
    """Parameters under this project's names from any file or folder that `load_backbone` accepts."""
    if not str(path_or_name):
        raise WeightsError("no file of weights is named: the name is empty")
    path = download(str(path_or_name)[3:]) if str(path_or_name).startswith("hf:") else Path(path_or_name)
    with _naming(path_or_name):
        if (path / "teacher").is_dir() or (path / "checkpoints").is_dir():
            path = newest_teacher(path)
        opened = open_path(path, trust)
        if METADATA_KEY in (opened.metadata or {}):
            weights = _own_weights(opened.content, opened.metadata or {})
        else:
            weights = convert(opened.content, opened.config, pickled=opened.metadata is None)
        layers = {key: tensor for key, tensor in weights.state.items() if key.endswith((".weight", ".bias"))}
        if strange := [key for key, tensor in layers.items() if not tensor.is_floating_point()]:
            kind = str(weights.state[strange[0]].dtype).removeprefix("torch.")
            raise WeightsError(f"quantised, or no weights: {_listed(strange)} of the type {kind}")
        _demand_normalisation(weights)
        bad = [key for key, tensor in weights.state.items() if not tensor.float().isfinite().all()]
        if bad:
            raise WeightsError(f"not finite: {_listed(bad)}")
    return weights


def newest_teacher(run_dir: Path) -> Path:
    """The teacher's backbone after the most steps in a run directory. Raises WeightsError where there is none yet."""
    found = sorted((run_dir / "teacher").glob("step_*.safetensors"))
    if not found:
        raise WeightsError("a run that has written no teacher yet (checkpoint.every says when it does)")
    return found[-1]


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
        raise WeightsError(f"{path}: of no known architecture ({kind}: {first_line(error)})") from error


def _own_weights(state: dict[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    try:
        config = ModelConfig(**json.loads(metadata[METADATA_KEY]))
        _demand_known_values(config)
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
        step=int(metadata["step"]) if metadata.get("step", "").isdecimal() else None,
    )


def _demand_known_values(config: ModelConfig) -> None:
    """Raises ValueError for an option of a later version, which would be built as if it were another."""
    kinds = get_type_hints(ModelConfig)
    for name, value in asdict(config).items():
        if get_origin(kinds[name]) is Literal and value not in get_args(kinds[name]):
            raise ValueError(f"{name}={value}")
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{name}={value}")


def _demand_normalisation(weights: Weights) -> None:
    """Raises WeightsError unless mean and std, where they are said, are numbers for each channel."""
    if weights.normalisation is None:
        return
    mean, std = weights.normalisation
    channels = weights.state["patch_embed.proj.weight"].shape[1]
    sound = len(mean) == len(std) == channels and all(isfinite(value) for value in (*mean, *std)) and min(std) > 0
    if not sound:
        raise WeightsError(f"mean {mean} and std {std} are not those of images of {channels} channels")


def _demand_same_keys(model: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    if missing := expected.keys() - state.keys():
        raise WeightsError(f"incomplete: without {_listed(sorted(missing))}")
    if strange := state.keys() - expected.keys():
        raise WeightsError(f"an unknown architecture: what is {_listed(sorted(strange))}?")
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
    theirs, notes = infer_config(weights), []
    for key in ("activation", "pre_norm", "norm_eps", "rope_base"):
        if (there := getattr(theirs, key)) != (own := getattr(config, key)):
            notes.append(f"the source has {key}={there}, this model {own}: it starts with other features")
    if not config.rope_base and (theirs.pos_antialias, theirs.pos_offset) != (config.pos_antialias, config.pos_offset):
        notes.append(
            f"the source resamples positions with antialias={theirs.pos_antialias}, offset={theirs.pos_offset}, this "
            f"model with antialias={config.pos_antialias}, offset={config.pos_offset}: other than native sizes differ "
            "slightly"
        )
    return notes


def _listed(keys: list[str]) -> str:
    """The keys in one line, blocks taken together, and how many are not shown."""
    short = compact(keys)
    return ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")


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
