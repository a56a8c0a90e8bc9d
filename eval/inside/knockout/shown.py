"""Knock-outs, masking, exchanged registers and patches beside CLS, told from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.inside.finding import Album, Finding, Seen, counted
from eval.inside.knockout.drawing import READ, SAID, curves_by_edge, greying, maps, swapped
from eval.inside.knockout.edges import CUT, MEAN, NOISE, SHUFFLE, SWAP, WAYS, ZERO

LITTLE = 10  # percent of the images
NEITHER = "In neither paper; it follows from both. "
Details = dict[str, Any]


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """D2, D4, D5 and D6."""
    return [_edges(seen, album), _masking(seen, album), _swaps(seen, album), _alignment(seen, album)]


def _edges(seen: Sequence[Seen], album: Album) -> Finding:
    pictures = [curves_by_edge(seen, album, "cosine", "cosine of CLS", "knockout-cosine")]
    if all(each.details["probe"] for each in seen):
        pictures.append(curves_by_edge(seen, album, "drop", "accuracy lost [points]", "knockout-accuracy"))
    return Finding(
        "D2",
        "What CLS loses when it may not look",
        "In one block, CLS is kept from reading the patches, the registers or itself. How much of its description of "
        "the image is lost at the end?",
        " ".join(map(_said_of_edges, seen)),
        f"{NEITHER}Lappe and Giese (2025) find that in the last attention of the largest DINOv2 with registers the "
        "registers' part is closer to the whole than the patches' part, while in small networks the patches' part is "
        "almost all of it. Parodi et al. (2026) warn that zeros mislead: in ViT-S and ViT-B they do far more harm "
        "than the mean, noise or another image's registers.",
        _basis(seen),
        pictures,
        ("cosine of CLS, points of accuracy lost", *SAID.values()),
        [row for each in seen for row in _edge_rows(each)],
        [
            "cut: the weights that are left are renormalised (the scores are -inf before the softmax), in every head",
            "instead of being cut, an edge may read other tokens, while all others go on seeing the true ones: zeros "
            "in the residual stream; the mean of that token over the images looked at; Gaussian noise with its mean "
            "and standard deviation in each channel; the tokens of another image at the same block (of another class "
            "where there are labels)",
            f"in windows of {seen[0].evaluation.protocol['window']} from the block given on, and in all blocks at once",
            "accuracy: of a classifier that was trained on unchanged class tokens of training images and then held "
            "fixed; a paired difference, its interval a bootstrap over images",
            *(f"{each.name}: {each.details['probe']}" for each in seen if each.details["probe"]),
        ],
    )  # fmt: skip


def _masking(seen: Sequence[Seen], album: Album) -> Finding:
    first: Details = seen[0].details["masking"]  # type: ignore[assignment]
    return Finding(
        "D4",
        "Does the attention map show what matters?",
        "Patches are painted grey, the most attended ones first, or at random. If the map of CLS's attention is true "
        "to what CLS uses, CLS changes faster in the former case; and patches that matter alone are bright on the "
        "map.",
        " ".join(map(_said_of_masking, seen)),
        f"{NEITHER}Lappe and Giese (2025) find that clean attention maps need not be faithful in large networks.",
        _masking_basis(seen),
        [greying(seen, album)] if first["images"] else [],
        ("", "change, attended first", "at random", "likeness kept, attended only", "at random", "rank correlation"),
        [_masking_row(each) for each in seen],
        [
            "attention: of CLS in the last block on patches, a mean over heads; grey: the mean colour that images "
            "are normalised with",
            "change: 1 - cosine between CLS after the final norm of the masked and of the whole image; the figures "
            "are areas under the curves from nothing to everything",
            "rank correlation: Spearman's, within an image, of the attention on a patch with the change when that "
            "patch alone is grey",
        ],
    )  # fmt: skip


def _swaps(seen: Sequence[Seen], album: Album) -> Finding:
    able = [each for each in seen if _registers(each)]
    return Finding(
        "D5",
        "Registers of another image",
        "The registers of an image are exchanged for those of an image of another class as they enter a block. If "
        "they hold what is in the image, CLS should now name the other image's class; if they are an offset that is "
        "always there, nothing should change.",
        " ".join(map(_said_of_swaps, seen)),
        f"{NEITHER}Darcet et al. find that registers hold global information; Lappe and Giese that the longest is "
        "almost the same in every image.",
        _basis(seen) + _pairs(seen),
        [swapped(able, album)] if able else [],
        ("", "cosine of CLS: another image's", "mean", "noise", "zeros", "names its own class", "the donor's"),
        [_swap_row(each) for each in seen],
        [
            "exchanged once, in the residual stream; from that block on they take part as ever. The table is of the "
            "block where another image's registers change CLS most",
            "own class: the one that the fixed classifier gives to the unchanged image, and for the donor likewise; "
            "pairs that it gives the same class are left out",
            f"{counted(int(seen[0].evaluation.protocol['donors']), 'donor')} at most, evenly spaced among the images; "
            "so some pairs share a donor, which the intervals do not know",
        ],
    )  # fmt: skip


def _alignment(seen: Sequence[Seen], album: Album) -> Finding:
    drawn = [each for each in seen if "photos" in each.arrays]
    return Finding(
        "D6",
        "Do patches speak the language of CLS?",
        "How alike are a patch and CLS in the end, and does a classifier that was trained on class tokens understand "
        "patches?",
        " ".join(map(_said_of_alignment, seen)),
        NEITHER.strip(),
        _basis(seen),
        [maps(drawn, album)] if drawn else [],
        ("", "cosine of patch and CLS", "patches named as the image is", "as CLS is", "chance"),
        [_alignment_row(each) for each in seen],
        ["patches and CLS after the final norm; the classifier is that of D2, which never saw a patch"],
    )


def _basis(seen: Sequence[Seen]) -> str:
    said = [_stands_on(each) for each in seen]
    if len(set(said)) == 1:
        return said[0] + (", for each network" if len(seen) > 1 else "")
    return "; ".join(f"{each.name}: {text}" for each, text in zip(seen, said, strict=True))


def _stands_on(seen: Seen) -> str:
    train = seen.evaluation.data.get("train") if seen.details["probe"] else 0
    images: int = seen.details["images_seen"]  # type: ignore[assignment]
    said = f"{counted(images, 'image')}, {_tokens(seen)}"
    return said + (f", classifier trained on {counted(train, 'image')}" if train else "")


def _masking_basis(seen: Sequence[Seen]) -> str:
    said = []
    for each in seen:
        told: Details = each.details["masking"]  # type: ignore[assignment]
        curves, single = counted(told["images"], "image"), counted(told["left_out"], "image")
        grid = np.prod(each.evaluation.protocol["grid"])
        said.append(f"{curves} for the curves, {single} for single patches, {grid:,} patches each")
    if len(set(said)) == 1:
        return said[0] + (", for each network" if len(seen) > 1 else "")
    return "; ".join(f"{each.name}: {text}" for each, text in zip(seen, said, strict=True))


def _pairs(seen: Sequence[Seen]) -> str:
    told = [row["images"] for each in seen for row in each.details["swap"]]  # type: ignore[attr-defined]
    if not told:
        return ""
    return f"; {min(told):,}{f' to {max(told):,}' if max(told) > min(told) else ''} pairs of two classes"


def _tokens(seen: Seen) -> str:
    number: int = seen.details["tokens"]  # type: ignore[assignment]
    return counted(number, "patch token")


def _registers(seen: Seen) -> bool:
    return any(run["edge"] == SWAP for run in seen.details["runs"])  # type: ignore[attr-defined]


def _run(seen: Seen, edge: str, way: str, first: int, last: int) -> Details | None:
    wanted = {"edge": edge, "way": way, "first": first, "last": last}
    runs: list[Details] = seen.details["runs"]  # type: ignore[assignment]
    return next((run for run in runs if wanted.items() <= run.items()), None)


def _ends(seen: Seen) -> list[tuple[int, int]]:
    """The last block, and all blocks."""
    depth: int = seen.details["depth"]  # type: ignore[assignment]
    return [(depth - 1, depth - 1), (0, depth - 1)]


def _said_of_edges(seen: Seen) -> str:
    """What the cuts leave in the last block and in all, and for registers what the gentler replacements do."""
    last, everywhere = _ends(seen)
    parts = []
    for edge, name in (("CLS<-PATCH", "patches"), ("CLS<-REG", "registers")):
        one, all_ = (_run(seen, edge, CUT, *span) for span in (last, everywhere))
        if one is not None and all_ is not None:
            parts.append(
                f"without {name} in the last block CLS keeps a cosine of {_left(one)}, without them in any block "
                f"{_left(all_)}"
            )
    zero, usual = (_run(seen, "CLS<-REG", way, *everywhere) for way in (ZERO, SHUFFLE))
    if zero and usual:
        parts.append(f"zeros for registers in all blocks leave {_left(zero)}, another image's registers {_left(usual)}")
    return f"{seen.name}: {'; '.join(parts)}."


def _left(run: Details) -> str:
    drop = run["drop"]
    said = f"{run['cosine']['value']:.2f}"
    if drop is None:
        return said
    value, low, high = (0.0 - drop[key] for key in ("value", "high", "low"))  # 0.0 and not -0.0
    return f"{said} (accuracy {value:+.1f} points, {low:+.1f} to {high:+.1f})"


def _edge_rows(seen: Seen) -> list[list[str]]:
    """Two rows an edge: in the last block, in all."""
    rows = []
    for edge, name in READ.items():
        for span, where in zip(_ends(seen), ("last block", "all blocks"), strict=True):
            cells = [_cell(_run(seen, edge, way, *span)) for way in WAYS]
            rows.append([f"{seen.name}: {name}, {where}", *cells])
    return rows


def _cell(run: Details | None) -> str:
    """The cosine, and where there are labels the loss of accuracy."""
    if run is None:
        return "–"
    said = f"{run['cosine']['value']:.3f}"
    return said if run["drop"] is None else f"{said}, {run['drop']['value']:+.1f}"


def _said_of_masking(seen: Seen) -> str:
    told: Details = seen.details["masking"]  # type: ignore[assignment]
    scores = seen.evaluation.scores
    if "deletion_over_random" not in scores:
        return f"{seen.name}: not measured."
    more = scores["deletion_over_random"]
    verdict = "faster than" if more.low > 0 else "slower than" if more.high < 0 else "no faster than"
    one, other = (each["value"] for each in told["areas"]["deletion"])
    areas = f"area {one:.3f} against {other:.3f}"
    said = f"{seen.name}: CLS changes {verdict} at random when attended patches go first ({areas})"
    if (correlation := scores.get("map_rank_correlation")) is None:
        return f"{said}."
    return f"{said}; rank correlation of the map with the effect of single patches {correlation.value:.2f}."


def _masking_row(seen: Seen) -> list[str]:
    told: Details = seen.details["masking"]  # type: ignore[assignment]
    areas = told.get("areas", {})
    cells = [
        f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        for name in ("deletion", "insertion")
        for score in areas.get(name, [])
    ]
    found = seen.evaluation.scores.get("map_rank_correlation")
    correlation = "–" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    return [seen.name, *(cells or ["–"] * 4), correlation]


def _worst(seen: Seen) -> int | None:
    """The block where another image's registers change CLS most."""
    runs: list[Details] = seen.details["runs"]  # type: ignore[assignment]
    own = [run for run in runs if run["edge"] == SWAP and run["way"] == SHUFFLE]
    return min(own, key=lambda run: run["cosine"]["value"])["first"] if own else None


def _said_of_swaps(seen: Seen) -> str:
    layer = _worst(seen)
    if layer is None:
        return f"{seen.name}: there are none to exchange."
    shuffled, mean = (_run(seen, SWAP, way, layer, layer) for way in (SHUFFLE, MEAN))
    assert shuffled and mean
    said = (
        f"{seen.name}: where it matters most, before block {layer + 1}, CLS keeps a cosine of "
        f"{shuffled['cosine']['value']:.3f} with another image's registers, {mean['cosine']['value']:.3f} with their "
        "mean"
    )
    swap: list[Details] = seen.details["swap"]  # type: ignore[assignment]
    row = next((row for row in swap if row["layer"] == layer), None)
    if row is None or not row["donor"]:
        return f"{said}."
    return (
        f"{said}; {row['receiver']['value']:.0f} % of the images are still given their own class, "
        f"{row['donor']['value']:.1f} % the donor's ({row['donor_by_mean']['value']:.1f} % with the mean, which "
        f"knows of no donor): {_verdict(row)}."
    )


def _verdict(row: Details) -> str:
    """Whom CLS believes."""
    if row["donor"]["low"] > row["receiver"]["high"]:
        return "CLS takes the class from the registers"
    if row["more"]["low"] > 0:
        return "CLS takes some of it from them"
    if row["donor"]["high"] < LITTLE:
        return "CLS does not take the class from them"
    return "no more than by chance, as far as these images tell"


def _swap_row(seen: Seen) -> list[str]:
    layer = _worst(seen)
    if layer is None:
        return [seen.name, *["–"] * 6]
    cells = []
    for way in (SHUFFLE, MEAN, NOISE, ZERO):
        run = _run(seen, SWAP, way, layer, layer)
        cells.append("–" if run is None else f"{run['cosine']['value']:.3f}")
    swap: list[Details] = seen.details["swap"]  # type: ignore[assignment]
    row = next((row for row in swap if row["layer"] == layer), None)
    for key in ("receiver", "donor"):
        score = row and row[key]
        cells.append(f"{score['value']:.1f} % ({score['low']:.1f} to {score['high']:.1f})" if score else "–")
    return [f"{seen.name}, before block {layer + 1}", *cells]


def _said_of_alignment(seen: Seen) -> str:
    told: Details = seen.details["alignment"]  # type: ignore[assignment]
    said = f"{seen.name}: the cosine of a patch with CLS is {told['cosine']['value']:.2f}"
    if "class" not in told:
        return f"{said}."
    return (
        f"{said}; {told['class']['value']:.1f} % of the patches are given the image's class "
        f"(CLS: {seen.details['top1']:.1f} %, chance {told['chance']:.2g} %)."
    )


def _alignment_row(seen: Seen) -> list[str]:
    told: Details = seen.details["alignment"]  # type: ignore[assignment]
    cells = [f"{told['cosine']['value']:.3f} ({told['cosine']['low']:.3f} to {told['cosine']['high']:.3f})"]
    for key in ("class", "as_cls"):
        score = told.get(key)
        cells.append(f"{score['value']:.1f} % ({score['low']:.1f} to {score['high']:.1f})" if score else "–")
    return [seen.name, *cells, f"{told['chance']:.2g} %" if "chance" in told else "–"]
