"""What a checkpoint holds, as one flat dictionary of tensors; what is no tensor is in the run's own words, in run.json.

objective.<name in its state dict>        student, teacher, heads, centers
optimizer.<parameter>.<exp_avg, ...>      without learning rates and the like, which come from the schedules
random.<cpu or cuda>.<rank>               the states of torch's generators
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinoreg.parallel.mesh import Ranks
from dinoreg.train.optimizer import Optimizer

State = dict[str, Tensor]


def state_of(objective: nn.Module, optimizer: Optimizer) -> tuple[State, State]:
    """What only an optimizer step changes, and what else there is: a forward pass moves centers, for one."""
    parameters = {f"objective.{name}" for name, _ in objective.named_parameters()}
    state = _objective_state(objective)
    steady = {name: tensor for name, tensor in state.items() if name in parameters}
    moving = {name: tensor for name, tensor in state.items() if name not in parameters}
    return steady | _optimizer_state(optimizer), moving


def _objective_state(objective: nn.Module) -> State:
    return {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}


def _optimizer_state(optimizer: Optimizer) -> State:
    """A parameter that never had a gradient has none."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in optimizer.student.named_parameters()
        for key, value in optimizer.adamw.state.get(parameter, {}).items()
    }


def random_state(ranks: Ranks) -> State:
    """Copies of the states of this rank's generators."""
    states = {f"random.cpu.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"random.cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


def room_for(metadata: Metadata, objective: nn.Module, optimizer: Optimizer, ranks: Ranks) -> State:
    """Tensors to read a checkpoint into: the objective's own, and new ones for the others that this rank needs.

    Raises ValueError when the checkpoint is of another objective.
    """
    saved = metadata.state_dict_metadata
    room = _objective_state(objective)
    _demand_same(room.keys(), {name for name in saved if name.startswith("objective.")})
    parameters = {name: parameter.detach() for name, parameter in optimizer.student.named_parameters()}
    for name, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata)  # `read_metadata` has seen to it
        if name.startswith("optimizer."):
            room[name] = _slot(parameters, name.removeprefix("optimizer."), entry)
        elif name in (f"random.cpu.{ranks.rank}", f"random.cuda.{ranks.rank}"):
            room[name] = torch.empty(entry.size, dtype=torch.uint8)
    return room


def _slot(parameters: Mapping[str, Tensor], name: str, entry: TensorStorageMetadata) -> Tensor:
    """For one tensor of a parameter's state. What has the parameter's shape is sharded as the parameter."""
    parameter = parameters.get(name.rpartition(".")[0])
    if parameter is None:
        raise ValueError(f"its optimizer has {name}, for which there is no parameter")
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=entry.properties.dtype)
    return torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)


def _demand_same(mine: Collection[str], saved: Collection[str]) -> None:
    for name in mine:
        if name not in saved:
            raise ValueError(f"it has no {name}")
    for name in saved:
        if name not in mine:
            raise ValueError(f"it has {name}, for which there is no place")


def take_over(state: State, optimizer: Optimizer, ranks: Ranks) -> None:
    """Give the optimizer and the generators what was read. The objective's tensors were filled in place.

    A generator that the checkpoint knows nothing of, for want of that rank or device, keeps its state.
    """
    slots: dict[str, State] = defaultdict(dict)
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            owner, _, key = name.removeprefix("optimizer.").rpartition(".")
            slots[owner][key] = tensor
    optimizer.adamw.state.clear()
    for name, parameter in optimizer.student.named_parameters():
        if name in slots:
            optimizer.adamw.state[parameter] = slots[name]
    if (cpu := state.get(f"random.cpu.{ranks.rank}")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := state.get(f"random.cuda.{ranks.rank}")) is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, ranks.device)
