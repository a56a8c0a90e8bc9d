"""The operations of a training step as a GPU would be given them: their arithmetic, and the bytes that they touch.

They are written down as the real step runs on tensors without memory (benchmarks/fake.py). A view costs nothing; an
operation in place reads and writes what it changes; rows that are picked or added to count, and not the tables that
they lie in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake import STEPS, fake_step
from dinoreg.chunks import CHUNK_ENTRIES, row_chunks
from dinoreg.losses import centering, distillation, sinkhorn
from dinoreg.models import heads
from dinoreg.models.attention import PREFERENCE
from dinoreg.models.layers import Block
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.recipe import RunConfig

Kind = Literal["products", "attention", "moving"]  # what only moves bytes


class Stretch(NamedTuple):
    """A part of a storage. size: bytes of it that are touched."""

    storage: int
    start: int
    size: int


@dataclass(frozen=True)
class Operation:
    """width: bytes of a number that is multiplied; place: what a compiler would see it with, 0 if with nothing.

    A place is a pass through a block, or, below 0, a piece of logits or prototypes.
    """

    kind: Kind
    flops: float
    width: int
    reads: tuple[Stretch, ...]
    writes: tuple[Stretch, ...]
    place: int = 0

    @property
    def bytes(self) -> int:
        return sum(stretch.size for stretch in (*self.reads, *self.writes))


def operations_of(cfg: RunConfig, side: str, ranks: Ranks) -> list[Operation]:
    """Of one update; side as in `fake_step`."""
    counter = Counter()
    with ExitStack() as stack:
        stack.enter_context(_as_on_a_gpu())
        stack.enter_context(patch.object(Block, "forward", counter.through(Block.forward)))
        for module in (sinkhorn, centering, distillation, heads):
            stack.enter_context(patch.object(module, "row_chunks", counter.pieces))
        stack.enter_context(counter)
        step = stack.enter_context(fake_step(cfg, side, ranks))
        for _ in range(STEPS):
            counter.forget()
            step()
        return counter.operations


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Attention by the kernel that a GPU tries first, logits in pieces of its size, and lists of tensors at once."""
    with (
        patch("dinoreg.models.vit.resolve_backend", lambda *_: PREFERENCE[0]),
        patch.dict(CHUNK_ENTRIES, cpu=CHUNK_ENTRIES["cuda"]),
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
    ):
        yield


class Counter(TorchDispatchMode):
    """Writes down all operations while the context lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._place, self._numbers = 0, count(1)
        self._alive: list[torch.UntypedStorage] = []  # so that no two storages have the same address

    def forget(self) -> None:
        self.operations.clear()
        self._alive.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads, writes = _traffic(func, args, kwargs, out)
        if writes:
            tensors = _tensors((args, kwargs, out))
            self._alive += [tensor.untyped_storage() for tensor in tensors]
            formula = _FORMULAS.get(func.overloadpacket)
            flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
            kind: Kind = "moving" if not flops else "attention" if "attention" in func.name() else "products"
            width = min(tensor.element_size() for tensor in tensors)
            place = self._place if func.namespace == "aten" else 0  # FSDP's own run around it
            self.operations.append(Operation(kind, flops, width, tuple(reads), tuple(writes), place))
        return out

    def through(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Block.forward, such that operations know that they belong to it, in the pass back too."""

        def watched(block: Block, x: Tensor, *rest: Any) -> Tensor:
            before, back, self._place = self._place, next(self._numbers), next(self._numbers)
            try:
                out = forward(block, x, *rest)
            finally:  # recomputing ends by an exception
                self._place = before
            if out.requires_grad:
                out.register_hook(lambda _: self._move(self._place, back))
            if x.requires_grad:  # this hook comes after that of the block before, which has the same tensor
                x.register_hook(lambda _: self._move(back, 0))
            return out

        return watched

    def pieces(self, table: Tensor) -> Iterator[tuple[int, int]]:
        """row_chunks, such that operations know the piece that they belong to."""
        for piece in row_chunks(table):
            self._place = -next(self._numbers)
            yield piece
            self._place = 0

    def _move(self, source: int, target: int) -> None:
        if self._place == source:
            self._place = target


def _tensors(values: Any) -> list[Tensor]:
    found = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found]


# -- bytes -----------------------------------------------------------------------------------------------------------

_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")  # what they change they do not read
_PICKS = ("index_select", "index", "gather")  # read rows of their first argument
_PUTS = {"index_add": 3, "index_copy": 3, "index_put": 2}  # change rows of it; which argument these come from


def _traffic(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[list[Stretch], list[Stretch]]:
    """What an operation reads and writes."""
    name, arguments = func.overloadpacket.__name__, func._schema.arguments
    by_name = {argument.name: argument for argument in arguments}
    given = chain(zip(arguments, args, strict=False), ((by_name[key], value) for key, value in kwargs.items()))
    reads: list[Stretch] = []
    writes: list[Stretch] = []
    for argument, value in given:
        stretches = [_stretch(tensor) for tensor in _tensors(value)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        writes += stretches if changed else []
        reads += [] if changed and (argument.is_out or name in _OVERWRITES) else stretches
    if not name.startswith(("empty", "new_empty")):
        known = {stretch.storage for stretch in (*reads, *writes)}
        writes += [stretch for stretch in map(_stretch, _tensors(out)) if stretch.storage not in known]
    if name.startswith("new_") or name.endswith("_like"):
        reads.clear()  # they look at its shape alone
    if name in _PICKS:
        reads[0] = reads[0]._replace(size=min(reads[0].size, writes[0].size))
    elif name.rstrip("_") in _PUTS:
        rows = writes[0]._replace(size=_stretch(*_tensors(args[_PUTS[name.rstrip("_")]])).size)
        # Autograd adds in place to the zeros that it made, but not to a fake tensor's.
        if name.endswith("_") or torch._C._current_graph_task_id() != -1:
            reads[0] = writes[0] = rows
        else:  # it copies the table first
            reads, writes = [*reads, rows], [*writes, rows]
    return reads, writes


def _stretch(tensor: Tensor) -> Stretch:
    """What a view repeats is touched once."""
    numbers = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    width, start = tensor.element_size(), int(tensor.storage_offset())
    return Stretch(tensor.untyped_storage()._cdata, width * start, width * numbers)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _packed(q: Tensor, groups: list[int], products: int) -> float:
    """So many products of tokens with tokens, in each sequence of the (T, heads, head_dim) tensor."""
    sequences = zip(groups[::2], groups[1::2], strict=True)
    return 2.0 * products * q.shape[1] * q.shape[2] * sum(number * tokens**2 for number, tokens in sequences)


_ATEN, _OURS = torch.ops.aten, torch.ops.dinoreg
_FORMULAS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
    _OURS.block_diagonal_attention: lambda q, k, v, groups, out_val: _packed(q, groups, 2),
    # q k^T once more, and the gradients of it, of the weights, of v, and of q or k
    _OURS.block_diagonal_attention_backward: lambda grad, out, lse, q, k, v, groups, out_val: _packed(q, groups, 5),
}
