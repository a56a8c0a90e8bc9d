"""`test-time-registers`: the neurons that make patches outliers write to added tokens instead; what that changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.inside.artifacts.clouds import check_rule
from eval.inside.artifacts.cutoff import decide_cutoff
from eval.inside.artifacts.summary import share_score
from eval.inside.frozen import Frozen, freeze
from eval.inside.intervene import hidden_width
from eval.inside.look import Batch, Look, LookConfig
from eval.inside.testtime.effect import COLUMNS, EDGES, effect, rows_of
from eval.inside.testtime.network import Copied, Neurons, RegisteredBackbone, Silenced
from eval.inside.testtime.neurons import Tally, leaving_norms, onset, others_alike, strongest, tally
from eval.inside.walk import walk
from eval.metrics import mean_score, share_interval
from eval.results import Result, Score
from eval.suite import Context

FILE = "neurons.json"
PLAIN, ADDED, SILENCED, RANDOM = "as it is", "register added", "neurons silenced", "random neurons moved"
FEW = 1.5  # times the others' norm, below which "outliers" are none in the papers' sense


@dataclass
class AddedRegistersConfig(LookConfig):
    """Jiang et al. (2025): one register; outliers told after the last block but one, beyond mean + 3 std.

    They use, for OpenCLIP B/16, cutoff=75 top_layer=5 top_k=10, for DINOv2 L/14 cutoff=150 top_layer=17 top_k=45.
    """

    detect: int = -2  # block after which outliers are told, as an index into a list
    cutoff: str = "3std"  # norm beyond which a patch is an outlier: as for `artifacts`
    cutoff_images: int = 256  # on which the cutoff is found
    top_layer: int | None = None  # last block whose neurons are considered; none = the one in which outliers rise
    top_k: int = 10  # neurons that are taken
    registers: int = 1  # tokens that are added; each is given the same
    copied: Copied = "strongest"  # what a register is given of all patches: what is farthest from 0, or the max
    silenced: Silenced = "patches"  # where the neurons are silenced: on patches, or also on CLS and trained registers
    probe: Literal["logreg", "knn"] = "logreg"  # classifier of class tokens, trained without any change, where labelled

    @staticmethod
    def quick() -> list[str]:
        return ["images=200", "train_images=2000", "cutoff_images=100"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        check_rule(self.cutoff)
        for key in ("top_k", "registers", "cutoff_images"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)


def run(backbone: Backbone, cfg: AddedRegistersConfig, context: Context) -> Result:
    """Finds the neurons, writes them to neurons.json, and measures the network with and without what they do.

    A network that has test-time registers already is compared with what it was without them.
    """
    given = None
    if isinstance(backbone, RegisteredBackbone):
        given, backbone = backbone.neurons, backbone.plain
    detect = _block(backbone, cfg.detect, "detect")
    look = Look(backbone, cfg, context)
    decided, found_on = decide_cutoff(look, cfg.cutoff, cfg.cutoff_images, detect)
    cutoff = decided.number()
    sums = _tally(look, detect, cutoff)
    found = given or _find(backbone, cfg, sums, detect, context.weights)
    said = ["the neurons were given, not found here"] if given else []
    networks = _networks(backbone, found)
    frozen = freeze(look, cfg.probe)
    rows, counts = _measure(look, networks, frozen, detect, cutoff)
    scores = _scores(rows)
    if found and context.ranks.is_main:
        path = found.write(context.output / FILE, cutoff=cutoff, detect=detect)
        context.say(f"this network with the added token, for any experiment: --weights {path}")
    arrays = {f"counts: {name}": counts[name] for name in networks} | _photos(look, networks, detect)
    result = look.result(
        "test-time-registers", scores, [*said, *_notes(sums, detect, found)], arrays=arrays,
        variants={name: _summary(rows[name], name, rows[PLAIN]) for name in networks},
        **_found_details(found, sums, detect, frozen), tokens=int(sums.patches.sum()),
        cutoff={"value": decided.value, "rule": decided.rule, "how": decided.how, **found_on},
    )  # fmt: skip
    if found:
        result.files["neurons"] = FILE
    return result


def _block(backbone: Backbone, index: int, key: str) -> int:
    if index not in range(-backbone.depth, backbone.depth):
        raise ConfigError(f"the network has {backbone.depth} blocks", key)
    return range(backbone.depth)[index]


def _tally(look: Look, detect: int, cutoff: float) -> Tally:
    def measure(batch: Batch) -> Tally:
        outliers = leaving_norms(look.backbone, batch.images, detect) > cutoff
        found = tally(look.backbone, batch.images, outliers)
        return Tally(found.activation.cpu(), found.norm.cpu(), found.patches.cpu())

    total: Tally | None = None
    for each in look.through(measure, "neurons on outliers"):
        if total is None:
            total = each
        else:
            total = Tally(
                total.activation + each.activation, total.norm + each.norm, total.patches + each.patches
            )  # fmt: skip
    ranks = look.context.ranks
    parts = [each for each in ranks.gather_objects(total) if each is not None]
    return Tally(
        *(torch.stack([getattr(part, key) for part in parts]).sum(0) for key in ("activation", "norm", "patches"))
    )


def _find(
    backbone: Backbone, cfg: AddedRegistersConfig, sums: Tally, detect: int, weights: Path | None
) -> Neurons | None:
    """None where there is no outlier."""
    if not sums.patches[0] or not sums.patches[1]:
        return None
    top = _top_layer(backbone, cfg, sums, detect)
    neurons = strongest(sums.mean_activation[0], top, cfg.top_k)
    where = str(weights.resolve()) if weights else ""
    return Neurons(tuple(neurons), cfg.registers, cfg.copied, cfg.silenced, backbone.digest, where)


def _top_layer(backbone: Backbone, cfg: AddedRegistersConfig, sums: Tally, detect: int) -> int:
    if cfg.top_layer is not None:
        return _block(backbone, cfg.top_layer, "top_layer")
    return onset(sums.mean_norm, detect)


def _networks(backbone: Backbone, found: Neurons | None) -> dict[str, Backbone]:
    """The network as it is, with the registers, and the two controls."""
    if found is None:
        return {PLAIN: backbone}
    block = backbone.model.blocks[0]
    others = others_alike(found.neurons, hidden_width(block.mlp))  # type: ignore[arg-type]
    return {
        PLAIN: backbone,
        ADDED: RegisteredBackbone(backbone, found),
        SILENCED: RegisteredBackbone(backbone, replace(found, registers=0)),
        RANDOM: RegisteredBackbone(backbone, replace(found, neurons=tuple(others))),
    }


def _measure(
    look: Look, networks: dict[str, Backbone], frozen: Frozen | None, detect: int, cutoff: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By network: one row an image (n, COLUMNS) in the order of the images, and counts of norms (3, bins)."""

    def measure(batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        outliers = leaving_norms(look.backbone, batch.images, detect) > cutoff
        found = {
            name: effect(network, batch.images, outliers, detect, cutoff) for name, network in networks.items()
        }  # fmt: skip
        plain = found[PLAIN].cls
        rows = {name: rows_of(each, plain, frozen, batch.labels) for name, each in found.items()}
        return batch.places, rows, {name: each.counts.cpu() for name, each in found.items()}

    mine: list[tuple[Tensor, dict[str, Tensor]]] = []
    total = {name: torch.zeros(3, len(EDGES) - 1, dtype=torch.int64) for name in networks}
    for places, one, counts in look.through(measure, "with and without the registers"):
        mine.append((places, one))
        total = {name: total[name] + counts[name] for name in networks}  # by batch they would be more than the rows
    shares = look.context.ranks.gather_objects((mine, total))
    pieces = [piece for share, _ in shares for piece in share]
    order = torch.cat([places for places, _ in pieces]).argsort()
    rows = {name: torch.cat([one[name] for _, one in pieces])[order] for name in networks}
    return rows, {name: torch.stack([share[name] for _, share in shares]).sum(0) for name in networks}


def _scores(rows: dict[str, Tensor]) -> dict[str, Score]:
    named = {PLAIN: "before", ADDED: "after"}
    scores = {
        f"outliers_{said}": share_score(_column(rows[name], "share"), "lower")
        for name, said in named.items()
        if name in rows
    }
    for name, said in named.items():
        if name in rows:
            scores[f"attention_on_outliers_{said}"] = share_score(_column(rows[name], "mass_outliers"), "lower")
    if ADDED in rows:
        scores["cosine_after"] = mean_score(_column(rows[ADDED], "cosine"))
    for name, said in named.items():
        if name in rows and not (right := _column(rows[name], "right")).isnan().any():
            low, high = share_interval(int(right.sum()), len(right))
            scores[f"top1_{said}"] = Score(100 * float(right.mean()), low, high, "%", per_image=100 * right.float())
    return scores


def _column(rows: Tensor, name: str) -> Tensor:
    return rows[:, COLUMNS.index(name)]


def _summary(rows: Tensor, name: str, plain: Tensor) -> dict[str, Any]:
    """Means over images with their intervals, None where there is nothing; and the paired change of accuracy."""
    found: dict[str, Any] = {column: _mean(_column(rows, column)) for column in COLUMNS}
    change = _column(rows, "right") - _column(plain, "right")
    found["change"] = None if name == PLAIN else _mean(change)
    return found


def _mean(values: Tensor) -> dict[str, float] | None:
    if values.isnan().any():
        return None
    score = mean_score(values)
    return {"value": score.value, "low": score.low, "high": score.high}


def _found_details(found: Neurons | None, sums: Tally, detect: int, frozen: Frozen | None) -> dict[str, Any]:
    norm = sums.mean_norm
    table = []
    if found is not None:
        activation = sums.mean_activation
        table = [
            {
                "block": block,
                "neuron": neuron,
                "outliers": _finite(activation[0, block, neuron]),
                "others": _finite(activation[1, block, neuron]),
            }
            for block, neuron in found.neurons
        ]
    return {
        "detect": detect,
        "onset": onset(norm, detect) if sums.patches.all() else None,
        "top_layer": max((block for block, _ in found.neurons), default=None) if found else None,
        "outliers": int(sums.patches[0]),
        "ratio": _finite(norm[0, detect + 1] / norm[1, detect + 1]),
        "ratio_entering": _finite(norm[0, 0] / norm[1, 0]),
        "norm_by_block": {"outliers": list(map(_finite, norm[0])), "others": list(map(_finite, norm[1]))},
        "neurons": table,
        **({key: getattr(found, key) for key in ("registers", "copied", "silenced")} if found else {}),
        "probe": frozen.kind if frozen else None,
        "edges": [round(float(edge), 6) for edge in EDGES],
    }


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _notes(sums: Tally, detect: int, found: Neurons | None) -> list[str]:
    if not sums.patches[1]:
        return ["all patches are beyond the cutoff: there is nothing to compare them with"]
    if not sums.patches[0]:
        return [
            "no patch is beyond the cutoff" + ("" if found else ": there is nothing to move, and no register was added")
        ]
    ratio = sums.mean_norm[0] / sums.mean_norm[1]
    entering, told = float(ratio[0]), float(ratio[detect + 1])
    if told < FEW * max(1, entering):
        return [
            f"the patches beyond the cutoff are {told:.2f} times as long as the others, and were {entering:.2f} times "
            "as long when they entered the first block: no artifacts that a block makes"
        ]
    return []


def _photos(look: Look, networks: dict[str, Backbone], detect: int) -> dict[str, Tensor]:
    """Maps of a few images: pixels (P, 3, S, S), and by network norms and CLS's attention (P, h, w)."""
    pixels, _ = look.photos()
    if not len(pixels):
        return {}
    found: dict[str, Tensor] = {"photos": pixels}
    for name in (PLAIN, ADDED):
        if name not in networks:
            continue
        first = 1 + networks[name].num_registers
        for step in walk(networks[name].model, look.prepare(pixels)):
            if step.index == detect:
                norms = step.leaving.float().norm(dim=-1)
        maps = {"norms": norms[:, first:], "attention": step.attention(slice(0, 1))[:, :, 0].mean(1)[:, first:]}
        found |= {f"{key}: {name}": each.unflatten(1, look.grid).cpu() for key, each in maps.items()}
        found[f"token norms: {name}"] = norms[:, :first].cpu()
    return found
