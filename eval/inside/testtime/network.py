"""A network with registers that were added after its training, and the file that says which neurons write to them.

From "Vision Transformers Don't Need Trained Registers" (Jiang et al., arXiv 2506.08010): the few neurons that make
patches outliers are made to write to a token of its own instead.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.layers import Block
from dinoreg.models.vit import VisionTransformer
from eval.backbone import Backbone, open_backbone
from eval.inside.intervene import EditedBlock, hidden_width
from eval.results import write_json

Copied = Literal["strongest", "max"]
Silenced = Literal["patches", "all"]


@dataclass(frozen=True)
class Neurons:
    """Register neurons of one network, and what is done with them.

    neurons: (block, neuron), the strongest first. registers: tokens that are added, each of which is given all of it; 0
    only silences the neurons. copied: the activation that a register is given: the largest of the image's patches, or
    the one farthest from zero ("strongest"). silenced: on patches, or also on CLS and trained registers. digest,
    weights: of the network they were found in, and where its file was.
    """

    neurons: tuple[tuple[int, int], ...]
    registers: int = 1
    copied: Copied = "strongest"
    silenced: Silenced = "patches"
    digest: str = ""
    weights: str = ""

    def by_block(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for block, neuron in self.neurons:
            found.setdefault(block, []).append(neuron)
        return found

    def write(self, path: Path, **more: Any) -> Path:
        return write_json(path, {**asdict(self), **more})


def read_neurons(path: str | Path) -> Neurons:
    """Raises ConfigError where the file is none."""
    try:
        content = json.loads(Path(path).read_text())
        pairs = tuple((int(block), int(neuron)) for block, neuron in content["neurons"])
        found = Neurons(pairs, *(content[key] for key in ("registers", "copied", "silenced", "digest", "weights")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "--weights") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no register neurons: `dinoreg-eval test-time-registers` writes neurons.json",
            "--weights",
        ) from error
    if not (found.neurons and isinstance(found.registers, int) and found.registers > 0):
        raise ConfigError(f"{path} names no neurons, or no register", "--weights")
    return found


class AddedRegisters(VisionTransformer):
    """The network of another one's weights, whose sequence is [CLS, trained registers, added ones, patches].

    What is added enters the first block as zeros, with no place and after any norm before it. num_registers counts all.
    """

    added = 0

    @staticmethod
    def of(model: VisionTransformer, found: Neurons) -> AddedRegisters:
        """Raises ConfigError where the network lacks such neurons. The weights are shared."""
        with torch.device("meta"):
            made = AddedRegisters(model.config, attention=model.attention, drop_path=False)
        made.load_state_dict(model.state_dict(), assign=True)
        made.normalisation, made.step = model.normalisation, model.step
        made.added = found.registers
        made.num_registers = model.num_registers + found.registers
        for index, neurons in found.by_block().items():
            block = model.blocks[index] if index in range(model.depth) else None
            if not isinstance(block, Block) or not all(each in range(hidden_width(block.mlp)) for each in neurons):
                raise ConfigError(f"the network has no neuron {max(neurons)} in block {index}", "--weights")
            shared = made.blocks[index]
            assert isinstance(shared, Block)
            first = 1 + model.num_registers
            places = slice(first, first + found.registers)
            at = torch.tensor(neurons, device=model.cls_token.device)
            edit = partial(move, neurons=at, registers=places, copied=found.copied, silenced=found.silenced)
            made.blocks[index] = EditedBlock(shared, edit)
        return made.eval()

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        tokens = super()._embed(images, mask, grid)
        first = 1 + self.num_registers - self.added
        nothing = tokens.new_zeros(len(tokens), self.added, tokens.shape[-1])
        return torch.cat([tokens[:, :first], nothing, tokens[:, first:]], dim=1)


def move(hidden: Tensor, neurons: Tensor, registers: slice, copied: Copied, silenced: Silenced) -> Tensor:
    """Hidden activations (B, T, H) with those of some neurons (K,) on patches moved to registers, in every image.

    registers: the last tokens before the patches.
    """
    hidden, neurons = hidden.clone(), neurons.to(hidden.device)
    patches = slice(registers.stop, None)
    values = hidden[:, patches, neurons]  # (B, N, K)
    if copied == "max":
        strongest = values.amax(dim=1, keepdim=True)
    else:
        strongest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    hidden[:, patches if silenced == "patches" else slice(None), neurons] = 0
    hidden[:, registers, neurons] = strongest.expand(-1, registers.stop - registers.start, -1)
    return hidden


class RegisteredBackbone(Backbone):
    """A backbone with test-time registers, for all experiments."""

    def __init__(self, plain: Backbone, found: Neurons) -> None:
        super().__init__(AddedRegisters.of(plain.model, found), plain.name)
        self.plain, self.neurons = plain, found
        registers = f"{found.registers} test-time register{'s' * (found.registers != 1)}"
        self.found = f"{plain.found}; {registers} ({len(found.neurons)} neurons)"

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> RegisteredBackbone:
        """Also of the network without them, which a comparison runs."""
        self.plain.to(device, dtype)
        super().to(device, dtype)
        return self

    @cached_property
    def digest(self) -> str:
        """Differs with the weights and with what is done to them."""
        said = json.dumps(asdict(replace(self.neurons, digest="", weights="")), sort_keys=True)
        return hashlib.sha256(f"{self.plain.digest} {said}".encode()).hexdigest()[:16]


def open_weights(name: str | Path) -> Backbone:
    """What `open_backbone` opens, or a neurons.json, which stands for its network with the registers.

    Raises WeightsError, or ConfigError where the file is none or its network is another one by now.
    """
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        return open_backbone(name)
    return with_test_time_registers(open_backbone(read_neurons(path).weights), path)


def with_test_time_registers(backbone: Backbone, path: str | Path) -> RegisteredBackbone:
    """The backbone with the registers of a neurons.json. Raises ConfigError where it was found in other weights."""
    found = read_neurons(path)
    if found.digest != backbone.digest:
        raise ConfigError(
            f"the neurons of {path} were found in other weights (hash {found.digest}, these are {backbone.digest})",
            "--weights",
        )
    return RegisteredBackbone(backbone, found)
