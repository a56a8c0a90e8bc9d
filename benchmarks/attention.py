"""Attention backends at a recipe's real mix of sequence lengths, forward and backward, side by side in one process.

    python -m benchmarks.attention [RECIPE] [key=value ...] [--images 8] [--precision bf16] [--out FILE.json]

The mix: two global crops and all local ones of each image, in one packed tensor, registers included. What each backend
that runs here is compared with is plain softmax(q k^T) v, one resolution after the other. flex is torch's
flex_attention, compiled, with a block mask that keeps sequences apart; it is not a backend of dinoreg, and is here to
tell whether it should be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.race import plain, race, show, write
from dinoreg.config import load
from dinoreg.models.attention import KNOWN, attend, unusable
from dinoreg.models.packing import Packing
from dinoreg.parallel.mesh import setup_ranks
from dinoreg.train.flops import sequences
from dinoreg.train.recipe import RunConfig

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """The whole matrix of weights in memory."""
    out = []
    for parts in zip(packing.split(q), packing.split(k), packing.split(v), strict=True):
        query, key, value = (part.transpose(1, 2) for part in parts)
        weights = (query @ key.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        out.append((weights @ value).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, packing: Packing, backend: str) -> Tensor:
    return attend(q, k, v, packing, backend)


def _learn(run: Run, parts: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(run(*parts), parts, grad)


def flex(packing: Packing, device: torch.device) -> Run:
    """flex_attention under a block-diagonal mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = torch.cat([
        torch.full((tokens,), number, device=device)
        for number, tokens in enumerate(tokens for count, tokens in packing.groups for _ in range(count))
    ])  # fmt: skip
    mask = create_block_mask(
        lambda b, h, q, k: owner[q] == owner[k], None, None, len(owner), len(owner), device=device.type
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
        out: Tensor = compiled(query, key, value, block_mask=mask)
        return out[0].transpose(0, 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.attention", description="Attention backends at the real mix.")
    parser.add_argument("recipe", nargs="?", default="vitl16_short_in1k")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=int, default=8, help="of this process (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flex", action="store_true", help="torch's flex_attention too, which is compiled first")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_intermixed_args()
    config = load(RunConfig, args.recipe, ["data.sources=[synthetic]", *args.overrides])
    ranks, console = setup_ranks(), Console()
    device, size = ranks.device, config.model.size
    head_dim, before = size.embed_dim // size.num_heads, 1 + config.model.num_registers
    groups = [(count * args.images, before + patches) for count, patches in sequences(config) if count]
    packing = Packing.of(groups, device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    shape = (packing.tokens, size.num_heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=dtype)
    attention: dict[str, Run] = {}
    for name in KNOWN:
        if why := unusable(name, device, dtype, head_dim):
            console.print(f"{name}: not here ({why})", style="dim", markup=False)
            continue
        attention[name] = partial(_attend, packing=packing, backend=name)
    if args.flex:
        attention["flex"] = flex(packing, device)
    attention["plain"] = partial(plain_attention, packing=packing)
    truth = plain_attention(q.detach().double(), k.detach().double(), v.detach().double(), packing)
    errors = {name: float((run(q, k, v).detach() - truth).abs().max()) for name, run in attention.items()}
    ways = {name: partial(_learn, run, (q, k, v), grad) for name, run in attention.items()}
    mix = " + ".join(f"{count} x {tokens}" for count, tokens in groups)
    laps = race(ways, device, args.rounds)
    show(f"{args.recipe}: {mix} tokens, {size.num_heads} heads of {head_dim}, {args.precision}", laps, console)
    for name, error in errors.items():
        console.print(f"{name}: within {error:.1e} of fp64", style="dim")
    result = {"recipe": args.recipe, "mix": groups, "precision": args.precision, "laps": plain(laps), "errors": errors}
    write(args.out, result, device)
    ranks.close()


if __name__ == "__main__":
    main()
