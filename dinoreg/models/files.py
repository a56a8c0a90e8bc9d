"""What lies in files of weights and in folders of a model hub, before anybody asks whose it is."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dinoreg.models.formats import WeightsError

FOLDER_FILES = (  # of a hub's folder, the first that is there
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass
class Opened:
    """Contents of a file or of a folder's files; metadata: that of safetensors, None where torch.save wrote it.

    config: what the JSON files beside it say, config.json and open_clip_config.json at the top level.
    """

    content: dict[str, Any]
    metadata: dict[str, str] | None
    config: dict[str, Any] = field(default_factory=dict)


def open_path(path: Path, trust: bool) -> Opened:
    """Open a file, or the files of a folder; trust: as in `load_backbone`. Raises WeightsError."""
    if path.is_dir():
        return _open_folder(path, trust)
    if not path.is_file():
        raise WeightsError("no such file or folder (models on the Hugging Face hub are written hf:ORG/NAME)")
    content, metadata = read_file(path, trust)
    return Opened(content, metadata, _read_configs(path.parent) if path.name in FOLDER_FILES else {})


def _open_folder(folder: Path, trust: bool) -> Opened:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [name for name in FOLDER_FILES if (folder / name).is_file()][:1]
    if not names and (folder / ".metadata").is_file():
        raise WeightsError("a checkpoint to go on from: give the run directory, in which teacher/ holds the backbone")
    if not names:
        raise WeightsError(f"a folder without {' or '.join(FOLDER_FILES[:2])}")
    opened = Opened({}, None, _read_configs(folder))
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"model.safetensors.index.json names {name}, which lies elsewhere")
        content, opened.metadata = read_file(folder / name, trust)
        opened.content |= content
    return opened


def _read_configs(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("config.json", "open_clip_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text())
            config |= {"preprocessor": said} if name.startswith("preprocessor") else said
    return config


def read_file(path: Path, trust: bool) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Contents and, of safetensors, metadata; told from the first bytes, since endings are used freely."""
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
        raise WeightsError(f"needs code that is not installed here ({first_line(error)})") from error
    # torch's reader takes any bytes for instructions, so what fails in it may be anything.
    except Exception as error:
        if "TorchScript" in str(error):
            raise WeightsError(_refusal("GLOBAL TorchScript")) from error
        raise WeightsError(f"truncated or damaged ({first_line(error)})") from error
    if isinstance(checkpoint, torch.jit.ScriptModule):  # as OpenAI published CLIP
        checkpoint = checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"holds a {type(checkpoint).__name__}, not a state dict")
    return dict(checkpoint), None


def _refusal(message: str) -> str:
    """Why torch would not open a file, without its advice."""
    if "truncated" in message:
        return "truncated"
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted is None:
        return "no checkpoint"
    return (
        f"would run code when opened: it asks for {wanted.group(1)}; if you trust whoever made it, pass trust=True to "
        "load_backbone, --trust to dinoreg export, or model.init_from_trusted=true to a run"
    )


def download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise WeightsError(f"hf:{name}: huggingface_hub is not installed: pip install 'dinoreg[eval]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*pytorch_model.bin"]))
    except Exception as error:  # the hub's errors have no common class, and any of them is the user's to read
        raise WeightsError(f"hf:{name}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or else its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raises OSError with the file's name where writers of weights say in words of their own that there is no room."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:  # torch's writer of archives finds less in the file than it wrote
        if "unexpected pos" not in str(error) and "file write failed" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
