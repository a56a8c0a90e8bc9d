"""What test-time registers changed, told and drawn from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.finding import COLOURS, Album, Finding, Picture, Seen, counted, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, ADDED, SILENCED, RANDOM = "as it is", "register added", "neurons silenced", "random neurons moved"
ROW = 2.9  # inches
BEFORE = "#AAAAAA"
SHORT = {PLAIN: "patches before", ADDED: "after"}
MOST_NEURONS = 20  # whose activations are drawn
MOST_PHOTOS = 4
FEW = 1.5
PAPER = (
    "Jiang et al. (2025): in OpenCLIP B/16 (10 neurons, up to block 6) and DINOv2 L/14 (45 neurons, up to block 18) "
    "a few neurons make the outliers. Moved to one added token, the maps are clean and figures stay: ImageNet 86.36 "
    "to 86.38 %, ADE20k 48.27 to 49.13 mIoU for DINOv2 L/14. Silencing the neurons without a register costs much "
    "instead (zero-shot 55.6 % after about 71 %)."
)


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """The one section of number 5."""
    pictures = [_overview(seen, album), *(_maps(each, album) for each in seen if "photos" in each.arrays)]
    return [
        Finding(
            "5",
            "Registers added after training",
            "A few neurons write the outliers. What happens when they write to an empty token that is added to the "
            "finished network, instead of to patches?",
            " ".join(map(_said, seen)),
            PAPER,
            _basis(seen),
            pictures,
            ("", "patches that are outliers", "longest patch", "registers, mean", "attention of CLS on outliers",
             "on registers", "cosine of CLS", "accuracy"),
            [row for each in seen for row in _rows(each)],
            _how(seen),
        )
    ]  # fmt: skip


def _basis(seen: Sequence[Seen]) -> str:
    said = [
        f"{counted(each.evaluation.images, 'image')}, {counted(int(details['tokens']), 'patch token')}"
        + (_trained(each.evaluation.data) if details["probe"] else "")
        for each in seen
        for details in [dict[str, Any](each.details)]
    ]
    if len(set(said)) == 1:
        return said[0] + (", for each network" if len(said) > 1 else "")
    return "; ".join(f"{each.name}: {text}" for each, text in zip(seen, said, strict=True))


def _trained(data: dict[str, Any]) -> str:
    return f", classifier trained on {counted(data['train'], 'image')}" if data.get("train") else ""


def _said(seen: Seen) -> str:
    """One network in a few sentences."""
    details: dict[str, Any] = seen.details
    variants = details["variants"]
    if ADDED not in variants:
        return f"{seen.name}: {_outliers(details)}, so that nothing was moved."
    added = variants[ADDED]
    moved = (
        f"moving {counted(len(details['neurons']), 'neuron')} to an added token leaves "
        f"{percent(added['share']['value'])} (moving as many random ones: "
        f"{percent(variants[RANDOM]['share']['value'])})"
    )
    return f"{seen.name}: {_outliers(details)}. There, {moved}; {_kept(variants)}."


def _outliers(details: dict[str, Any]) -> str:
    """How many, and how much longer; and whether a block makes them."""
    ratio, entering = details["ratio"], details["ratio_entering"]
    if not details["outliers"]:
        value = details["cutoff"]["value"]
        return f"no patch is beyond the cutoff of {value:.3g}" if value else "no patch stands out by its norm"
    if ratio is None:
        return "all patches are beyond the cutoff, which tells none from the others"
    share = percent(details["variants"][PLAIN]["share"]["value"])
    said = f"{share} of the patches are beyond the cutoff, {ratio:.1f} times as long as the others"
    if ratio < FEW:
        return f"{said}: these are no artifacts as in the papers"
    if ratio < FEW * entering:
        return (
            f"{said}; but they were {entering:.1f} times as long when they entered the first block, so that no block "
            "makes them: these are no artifacts as in the papers"
        )
    return f"{said}; they rise in block {details['onset'] + 1}"


def _kept(variants: dict[str, Any]) -> str:
    """What CLS says afterwards."""
    added, silenced = variants[ADDED], variants[SILENCED]
    said = f"the class token keeps a cosine of {added['cosine']['value']:.3f} to its old self"
    if (change := added["change"]) is None:
        return f"{said} (neurons silenced without a register: {silenced['cosine']['value']:.3f})"
    without = silenced["change"]["value"]
    return (
        f"{said}, and accuracy changes by {_points(change)} (neurons silenced without a register: {100 * without:+.1f})"
    )


def _points(change: dict[str, float]) -> str:
    return f"{100 * change['value']:+.1f} points ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"


def _rows(seen: Seen) -> list[list[str]]:
    found = []
    variants: dict[str, Any] = seen.details["variants"]  # type: ignore[assignment]
    for name, variant in variants.items():
        accuracy = _percent(variant["right"])
        if variant["right"] and variant["change"]:
            accuracy += f" ({_points(variant['change'])})"
        cells = [_percent(variant["share"]), _number(variant["norm_longest"]), _number(variant["norm_registers"])]
        cells += [_percent(variant["mass_outliers"]), _percent(variant["mass_registers"])]
        found.append([f"{seen.name}, {name}", *cells, _number(variant["cosine"], 3), accuracy])
    return found


def _percent(score: dict[str, float] | None) -> str:
    return "–" if score is None else percent(score["value"])


def _number(score: dict[str, float] | None, digits: int = 1) -> str:
    return "–" if score is None else f"{score['value']:.{digits}f}"


def _how(seen: Sequence[Seen]) -> list[str]:
    said = [
        "neurons: those with the highest mean |activation| on outlier patches over all images, in blocks up to the "
        "one where outliers rise, which is the first after which they are half as far above the others as where they "
        "are told, unless top_layer says otherwise; a neuron is what the last matrix of a feed-forward layer reads "
        "(for SwiGLU the product of gate and value)",
        "the added token enters the first block as zeros, behind CLS and trained registers, without a position, and "
        "after any norm before the first block; the paper's code appends it at the end, which is the same to "
        "attention",
        "neurons are silenced in every image of a batch (published code does so in its first image alone)",
        "attention on outliers: that of CLS in the last block, a mean over heads, on the patches that are outliers "
        "in the network as it is; accuracy: of a classifier that was trained on class tokens of the network as it is",
    ]
    return said + [f"{each.name}: {_how_one(each.details)}" for each in seen]


def _how_one(details: dict[str, Any]) -> str:
    """What may differ from network to network; of neurons that were given, what their file says."""
    value, how = details["cutoff"]["value"], details["cutoff"]["how"]
    said = f"outliers are patches longer than {value:.4g} ({how})" if value else how
    said = f"{said} after block {details['detect'] + 1}"
    if details["neurons"]:
        said += (
            "; the register is given, in each image, each neuron's activation of the patch where it is "
            f"{'farthest from zero, with its sign' if details['copied'] == 'strongest' else 'largest'}, "
            f"and neurons are silenced on {'patches' if details['silenced'] == 'patches' else 'all other tokens'}"
        )
        if details["registers"] > 1:
            said += f"; each of {details['registers']} registers is given all of it"
    return said + (f"; {details['probe']}" if details["probe"] else "; no labels: no accuracy")


def _overview(seen: Sequence[Seen], album: Album) -> Picture:
    """A row a network: where outliers rise, norms before and after, and the neurons."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, ROW * len(seen)), layout="constrained")
    grid = figure.subplots(len(seen), 3, squeeze=False)
    for row, (each, axes) in enumerate(zip(seen, grid, strict=True)):
        _draw_rise(axes[0], each, COLOURS[row % len(COLOURS)])
        _draw_norms(axes[1], each, COLOURS[row % len(COLOURS)])
        _draw_neurons(axes[2], each, COLOURS[row % len(COLOURS)])
        axes[0].set_ylabel(f"{each.name}\nmean norm of patches")
    for column in (0, 1):
        _same_limits(list(grid[:, column]), column)
    caption = (
        "Left: mean norm of patches that will be outliers, and of the others, through the network; the dotted line "
        "is the last block with a neuron that is moved. Middle: how many patches have which norm where outliers are "
        "told, before and after, and the registers afterwards. Right: mean |activation| of the neurons that are moved."
    )
    return album.save(figure, "test-time-registers", caption)


def _same_limits(axes: Sequence[Axes], column: int) -> None:
    lows, highs = zip(*(each.get_ylim() if column == 0 else each.get_xlim() for each in axes), strict=True)
    for each in axes:
        (each.set_ylim if column == 0 else each.set_xlim)(min(lows), max(highs))


def _draw_rise(axes: Axes, seen: Seen, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    norms: dict[str, list[float | None]] = seen.details["norm_by_block"]  # type: ignore[assignment]
    for name, style in (("outliers", colour), ("others", BEFORE)):
        values = [np.nan if each is None else each for each in norms[name]]
        axes.plot(range(len(values)), values, color=style, marker="o", markersize=3, label=name)
    if (top := seen.details["top_layer"]) is not None:
        axes.axvline(float(top) + 1, color="black", linewidth=0.8, linestyle=":")  # type: ignore[arg-type]
    axes.set(yscale="log", xlabel="after block (0: as they enter)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_numbers(axes)
    _legend(axes)


def _draw_norms(axes: Axes, seen: Seen, colour: str) -> None:
    edges = np.array(seen.details["edges"])
    shares = {}
    for name in (PLAIN, ADDED):
        if (counts := seen.arrays.get(f"counts: {name}")) is not None:
            shares[name] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for name, style in ((PLAIN, BEFORE), (ADDED, colour)):
        if name in shares:
            width = 3.0 if name == PLAIN else 1.2  # seen also where both are the same
            axes.stairs(shares[name][2], edges, color=style, linewidth=width, label=SHORT[name])
    if ADDED in shares and shares[ADDED][1].any():
        axes.stairs(shares[ADDED][1], edges, color=colour, alpha=0.3, fill=True, label="registers")
    if cutoff := seen.details["cutoff"]["value"]:  # type: ignore[index]
        axes.axvline(cutoff, color="black", linewidth=0.8, linestyle=":")
    used = np.any([share.sum(0) > 0 for share in shares.values()], axis=0)
    low = min(float(share[share > 0].min()) for share in shares.values())
    axes.set(xscale="log", yscale="log", xlabel="norm (dotted: cutoff)", ylabel="share of tokens", ylim=(low / 2, 2))
    axes.set_xlim(edges[:-1][used].min() / 1.5, edges[1:][used].max() * 1.5)
    _legend(axes)


def _draw_neurons(axes: Axes, seen: Seen, colour: str) -> None:
    neurons: list[dict[str, Any]] = seen.details["neurons"][:MOST_NEURONS]  # type: ignore[index]
    if not neurons:
        axes.text(0.5, 0.5, "no outliers", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    at = np.arange(len(neurons))
    axes.barh(at - 0.2, [each["outliers"] or 0 for each in neurons], 0.4, color=colour, label="on outliers")
    axes.barh(at + 0.2, [each["others"] or 0 for each in neurons], 0.4, color=BEFORE, label="on other patches")
    axes.set_yticks(at, [f"block {each['block'] + 1}, {each['neuron']}" for each in neurons], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("mean |activation|")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above, where it hides nothing."""
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)


def _plain_numbers(axes: Axes) -> None:
    """20 and not 2 x 10^1, also where the axis is shorter than a power of ten."""
    from matplotlib.ticker import LogFormatter

    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _maps(seen: Seen, album: Album) -> Picture:
    """A row a photo: norms and attention before and after, on the same scale."""
    from matplotlib.figure import Figure

    photos = seen.arrays["photos"][:MOST_PHOTOS]
    names = [name for name in (PLAIN, ADDED) if f"norms: {name}" in seen.arrays]
    columns = [("norms", name) for name in names] + [("attention", name) for name in names]
    figure = Figure(figsize=(1.9 * (1 + len(columns)), 1.9 * len(photos) + 0.3), layout="constrained")
    grid = figure.subplots(len(photos), 1 + len(columns), squeeze=False)
    for row, (photo, axes) in enumerate(zip(photos, grid, strict=True)):
        axes[0].imshow(photo.transpose(1, 2, 0))
        for place, (kind, name) in zip(axes[1:], columns, strict=True):
            maps: list[NDArray[Any]] = [seen.arrays[f"{kind}: {each}"][row] for each in names]
            low = 0 if kind == "attention" else min(each.min() for each in maps)
            place.imshow(maps[names.index(name)], cmap="viridis", vmin=low, vmax=max(each.max() for each in maps))
    for axes, title in zip(grid[0], ["photo", *(f"{kind}\n{name}" for kind, name in columns)], strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    caption = (
        f"{seen.name}: norms of patches where outliers are told, and attention of CLS in the last block (mean over "
        "heads), before and after; the two maps of a pair have one scale, from dark (low) to bright (high)."
    )
    return album.save(figure, f"test-time-registers-maps-{_slug(seen.name)}", caption)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
