"""Operations of a block that keep less for the backward pass than the same written plainly.

Of what a plain block keeps, more than 40 % are results that are cheap to make again: outputs of norms and activations
(kept because the linear layer after them needs its input), and branches before LayerScale. Matrix products and
attention are never computed twice; that is what `efficiency.activation_checkpointing` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Make = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Linear(nn.Linear):
    """A linear layer whose matrix product may be replaced by another one, such as that of float8.py."""

    product: Product = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def linear_of(make: Make | None, x: Tensor, layer: Linear, gain: Tensor | None = None) -> Tensor:
    """gain * layer(make(x)), row by row, keeping x and not make(x). make: pointwise on rows; None is the identity.

    The gain (out,) multiplies the weights and not the many rows: LayerScale then costs no pass over the tokens, and
    none of them is kept for its gradient.
    """
    if not x.requires_grad or (make is None and gain is None):
        made = layer(x if make is None else make(x))
        return made if gain is None else made * gain
    # The compiler decides by itself what to make again, and under autocast the dtypes of the two passes would differ.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return layer.product(x if make is None else make(x), *_scaled(layer.weight, layer.bias, gain))
    parameters = tuple(make.parameters()) if isinstance(make, nn.Module) else ()
    return _LinearOf.apply(layer.product, make, x, layer.weight, layer.bias, gain, *parameters)


def _scaled(weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if gain is None:
        return weight, bias
    return gain[:, None] * weight, None if bias is None else gain * bias


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        make: Make | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        """parameters: those of `make`, so that their gradients have somewhere to go."""
        ctx.product, ctx.make = product, make
        ctx.save_for_backward(x, weight, bias, gain, *parameters)
        return product(x if make is None else make(x), *_scaled(weight, bias, gain))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gain, *parameters = ctx.saved_tensors
        _, _, for_x, for_weight, for_bias, for_gain, *for_parameters = ctx.needs_input_grad
        inner = ctx.product(grad, _scaled(weight, None, gain)[0].T, None) if for_x or any(for_parameters) else None
        made, found = _again(
            ctx.make, x, inner, [p for p, needed in zip(parameters, for_parameters, strict=True) if needed]
        )
        by_weight = grad.T @ made if for_weight or for_gain else None
        by_bias = grad.sum(0) if bias is not None and (for_bias or for_gain) else None
        by_gain = None
        if gain is not None:
            if for_gain and by_weight is not None:
                by_gain = torch.linalg.vecdot(by_weight, weight)
                by_gain = by_gain if by_bias is None else by_gain.addcmul_(by_bias, bias)
            by_weight = None if by_weight is None else by_weight.mul_(gain[:, None])
            by_bias = None if by_bias is None else by_bias * gain
        rest = iter(found[1:])
        return None, None, found[0], by_weight, by_bias, by_gain, *(next(rest) if p else None for p in for_parameters)


def _again(
    make: Make | None, x: Tensor, grad: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """(make(x), the gradients of x and of the parameters where that of make(x) is given)."""
    if make is None:
        return x, [grad]
    # Hooks on a module have seen the forward pass, and shall not see this repetition.
    make = make.forward if isinstance(make, nn.Module) else make
    with torch.enable_grad():
        source = x.detach().requires_grad_()
        made = make(source)
    if grad is None:
        return made.detach(), [None]
    return made.detach(), torch.autograd.grad(made, [source, *parameters], grad)


def add_rows(x: Tensor, rows: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
    """x (T, D) with gain (T', 1) * branch (T', D) added to `rows` (T',) of it; keeps rows and gain alone."""
    if torch.compiler.is_compiling():
        return x.index_add(0, rows, branch * gain)
    return _AddRows.apply(x, rows, branch, gain)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, branch: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gain)
        return x.index_add(0, rows, branch * gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        rows, gain = ctx.saved_tensors
        return grad, None, grad.index_select(0, rows).mul_(gain), None
