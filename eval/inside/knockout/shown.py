"""Knock-outs, masking, exchanged registers and patches beside CLS, told and drawn from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.inside.finding import COLOURS, Album, Finding, Picture, Seen, counted
from eval.inside.knockout.edges import CUT, EDGES, MEAN, NOISE, SHUFFLE, SWAP, WAYS, ZERO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {CUT: "black", ZERO: COLOURS[1], MEAN: COLOURS[0], NOISE: COLOURS[2], SHUFFLE: COLOURS[3]}
SAID = {
    CUT: "cut", ZERO: "as zeros", MEAN: "as their mean", NOISE: "as noise", SHUFFLE: "as another image's",
}  # fmt: skip
READ = {
    "CLS<-PATCH": "CLS reads patches", "CLS<-CLS": "CLS reads itself", "CLS<-REG": "CLS reads registers",
    "PATCH<-REG": "patches read registers",
}  # fmt: skip
GREY = "#888888"
PANEL = (2.9, 2.4)  # inches
MOST_PHOTOS = 4
LITTLE = 10  # percent of the images
NEITHER = "In neither paper; it follows from both. "
Details = dict[str, Any]


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """D2, D4, D5 and D6."""
    return [_edges(seen, album), _masking(seen, album), _swaps(seen, album), _alignment(seen, album)]


def _edges(seen: Sequence[Seen], album: Album) -> Finding:
    pictures = [_curves_by_edge(seen, album, "cosine", "cosine of CLS", "knockout-cosine")]
    if all(each.details["probe"] for each in seen):
        pictures.append(_curves_by_edge(seen, album, "drop", "accuracy lost [points]", "knockout-accuracy"))
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
        f"{counted(first['images'], 'image')} for the curves, {counted(first['left_out'], 'image')} for single "
        f"patches, {np.prod(seen[0].evaluation.protocol['grid'])} patches each",
        [_greying(seen, album)] if first["images"] else [],
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
        [_swapped(able, album)] if able else [],
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
        [_maps(drawn, album)] if drawn else [],
        ("", "cosine of patch and CLS", "patches named as the image is", "as CLS is", "chance"),
        [_alignment_row(each) for each in seen],
        ["patches and CLS after the final norm; the classifier is that of D2, which never saw a patch"],
    )


def _basis(seen: Sequence[Seen]) -> str:
    first = seen[0]
    train = first.evaluation.data.get("train")
    images: int = first.details["images_seen"]  # type: ignore[assignment]
    said = f"{counted(images, 'image')}, {_tokens(first)}"
    return said + (f"; classifier trained on {counted(train, 'image')}" if train else "")


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


def _curves_by_edge(seen: Sequence[Seen], album: Album, key: str, label: str, name: str) -> Picture:
    """A row a network, a column an edge, a line a way."""
    from matplotlib.figure import Figure

    edges = [edge for edge in EDGES if any(run["edge"] == edge for each in seen for run in each.details["runs"])]  # type: ignore[attr-defined]
    figure = Figure(figsize=(PANEL[0] * len(edges), PANEL[1] * len(seen) + 0.5), layout="constrained")
    grid = figure.subplots(len(seen), len(edges), squeeze=False, sharey=True)
    for each, row in zip(seen, grid, strict=True):
        for edge, axes in zip(edges, row, strict=True):
            _draw_ways(axes, each, edge, WAYS, key)
        row[0].set_ylabel(f"{each.name}\n{label}")
    for edge, axes in zip(edges, grid[0], strict=True):
        axes.set_title(READ[edge], fontsize=10)
    _legend(figure, WAYS)
    what = (
        "Cosine of the final CLS to the unchanged one"
        if key == "cosine"
        else "Accuracy that the fixed classifier loses"
    )
    caption = (
        f"{what}, when one kind of token is kept from reading another in the block on the axis (dots at the right: in "
        "all blocks at once). Bars: 95 % intervals over images."
    )
    return album.save(figure, name, caption)


def _draw_ways(axes: Axes, seen: Seen, edge: str, ways: Sequence[str], key: str) -> None:
    depth: int = seen.details["depth"]  # type: ignore[assignment]
    runs: list[Details] = [run for run in seen.details["runs"] if run["edge"] == edge]  # type: ignore[attr-defined]
    if not runs:
        axes.text(0.5, 0.5, "– (no registers)", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        return
    layers: list[int] = seen.details["layers"]  # type: ignore[assignment]
    end = 1.18 * depth + 0.8
    for place, way in enumerate(ways):
        mine = [run for run in runs if run["way"] == way and run[key] is not None]
        single = [run for run in mine if (run["first"], run["last"]) != (0, depth - 1) and run["first"] in layers]
        shift = 0.01 * depth * (place - 2)  # side by side
        _bars(axes, [run["first"] + 1 + shift for run in single], [run[key] for run in single], way, "-")
        whole = [run[key] for run in mine if (run["first"], run["last"]) == (0, depth - 1)]
        _bars(axes, [end + 3 * shift for _ in whole], whole, way, "")
    ticks = layers if len(layers) < 8 else layers[::2]
    ends = [] if edge == SWAP else [end]
    axes.set_xticks(
        [*(layer + 1 for layer in ticks), *ends], [*(str(layer + 1) for layer in ticks), *(["all"] if ends else [])]
    )
    axes.set_xlabel("block")


def _bars(axes: Axes, at: Sequence[float], scores: Sequence[dict[str, float]], way: str, line: str) -> None:
    if not scores:
        return
    value = np.array([score["value"] for score in scores])
    spread = np.abs([[score["low"] for score in scores], [score["high"] for score in scores]] - value)
    axes.errorbar(
        at,
        value,
        spread,
        color=STYLES[way],
        linestyle=line or "none",
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.7,
    )


def _legend(figure: Figure, ways: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=STYLES[way], marker="o", markersize=3, label=SAID[way]) for way in ways]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(ways), frameon=False, fontsize=9)


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


def _greying(seen: Sequence[Seen], album: Album) -> Picture:
    """Deletion, insertion, and the correlations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1), layout="constrained")
    removed, kept, alone = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for place, each in enumerate(seen):
        told: Details = each.details["masking"]  # type: ignore[assignment]
        if not told["images"]:
            continue
        colour, share = COLOURS[place % len(COLOURS)], 100 * np.array(told["fractions"])
        curves = {name: np.array([score["value"] for score in curve]) for name, curve in told["deletion"].items()}
        removed.plot(share, curves["attended"], color=colour, label=each.name)
        removed.plot(share, curves["random"], color=colour, linestyle="--")
        kept.plot(share, 1 - curves["least"][::-1], color=colour)
        kept.plot(share, 1 - curves["random"][::-1], color=colour, linestyle="--")
        found = told.get("correlations", [])
        alone.plot(np.full(len(found), place), found, "o", color=colour, markersize=4, alpha=0.6)
        if found:
            alone.plot([place - 0.25, place + 0.25], [np.mean(found)] * 2, color=colour)
    removed.set(xlabel="patches that are grey [%]", ylabel="change of CLS (1 - cosine)")
    kept.set(xlabel="patches that are left [%]", ylabel="likeness of CLS (cosine)")
    alone.set(ylabel="rank correlation, map and effect", ylim=(-1, 1), xlim=(-0.6, len(seen) - 0.4))
    alone.set_xticks(range(len(seen)), [each.name for each in seen], fontsize=8)
    alone.axhline(0, color=GREY, linewidth=0.7)
    removed.plot([], [], color="black", linestyle="--", label="at random")
    removed.legend(frameon=False, fontsize=8)
    caption = (
        "Left: patches vanish, the most attended first (dashed: at random). Middle: patches appear, the most "
        "attended first. Right: one dot an image, how the attention map ranks patches against what each alone does "
        "to CLS; the line is the mean."
    )
    return album.save(figure, "knockout-masking", caption)


def _swapped(seen: Sequence[Seen], album: Album) -> Picture:
    """A row a network with registers: CLS's cosine, and whose class is named."""
    from matplotlib.figure import Figure

    labelled = any(each.details["swap"] for each in seen)
    figure = Figure(figsize=(4.4 * (1 + labelled), 2.9 * len(seen) + 0.4), layout="constrained")
    grid = figure.subplots(len(seen), 1 + labelled, squeeze=False)
    ways = WAYS[1:]
    for each, row in zip(seen, grid, strict=True):
        _draw_ways(row[0], each, SWAP, WAYS, "cosine")
        row[0].set(ylabel=f"{each.name}\ncosine of CLS", xlabel="block that the registers enter")
        if labelled:
            _draw_shares(row[1], each)
    _legend(figure, ways)
    caption = (
        "Registers replaced once, as they enter the block on the axis. Left: how much of CLS is left at the end. "
        "Right, where images have classes: whose class the fixed classifier names after an exchange with another "
        "image."
    )
    return album.save(figure, "knockout-swap", caption)


def _draw_shares(axes: Axes, seen: Seen) -> None:
    rows: list[Details] = [row for row in seen.details["swap"] if row["donor"]]  # type: ignore[attr-defined]
    for key, colour, label in (("receiver", COLOURS[0], "its own"), ("donor", COLOURS[3], "the donor's")):
        value = np.array([row[key]["value"] for row in rows])
        spread = np.abs([[row[key][end] for row in rows] for end in ("low", "high")] - value)
        axes.errorbar(
            [row["layer"] + 1 for row in rows], value, spread, color=colour, marker="o", markersize=3, label=label
        )
    axes.set(xlabel="block that the registers enter", ylabel="class named [% of images]", ylim=(-3, 103))
    axes.set_xticks([row["layer"] + 1 for row in rows])
    axes.legend(frameon=False, fontsize=8)


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
        f"{row['donor']['value']:.1f} % the donor's: {_verdict(row)}."
    )


def _verdict(row: Details) -> str:
    """Whom CLS believes."""
    if row["donor"]["low"] > row["receiver"]["high"]:
        return "CLS takes the class from the registers"
    if row["donor"]["high"] < LITTLE:
        return "CLS does not take the class from them"
    return "CLS takes some of it from them"


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


def _maps(seen: Sequence[Seen], album: Album) -> Picture:
    """A row a photo; of each network the likeness with CLS, its attention, and where CLS's class is named."""
    from matplotlib.figure import Figure

    kinds = {"cosine": "cosine with CLS", "attention": "attention", "named": "named as CLS"}
    columns = [(each, kind) for each in seen for kind in kinds if kind in each.arrays]
    rows = min(MOST_PHOTOS, *(len(each.arrays["photos"]) for each in seen))
    figure = Figure(figsize=(1.55 * (1 + len(columns)), 1.55 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, 1 + len(columns), squeeze=False)
    shown = np.concatenate([each.arrays["cosine"][:rows].ravel() for each in seen])
    low, high = float(shown.min()), float(shown.max())
    limits = {"cosine": (low, high), "attention": (0, None), "named": (0, 1)}
    for row, axes in enumerate(grid):
        axes[0].imshow(seen[0].arrays["photos"][row].transpose(1, 2, 0))
        for place, (each, kind) in zip(axes[1:], columns, strict=True):
            place.imshow(
                each.arrays[kind][row],
                vmin=limits[kind][0],
                vmax=limits[kind][1],
                cmap="gray" if kind == "named" else "viridis",
            )
    for axes, (each, kind) in zip(grid[0, 1:], columns, strict=True):
        axes.set_title(f"{each.name}\n{kinds[kind]}", fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    caption = (
        f"Cosine of each patch with CLS (dark {low:.2f}, bright {high:.2f}), attention of CLS in the last block (dark "
        "0, bright the largest of the map), and in white the patches that the classifier of class tokens gives the "
        "class of CLS."
    )
    return album.save(figure, "knockout-maps", caption)
