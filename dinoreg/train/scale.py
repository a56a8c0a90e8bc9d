"""`dinoreg train CONFIG --dry-run world_size=1024`: a run on many GPUs, looked at on one machine without any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from rich.console import Console
from rich.table import Table

from dinoreg.config import ConfigError, load
from dinoreg.data.sources import Sources, open_sources
from dinoreg.train.cluster import HOP_ACROSS, HOP_INSIDE, LINK_SHARE, START, ClusterConfig
from dinoreg.train.layout import MODES, Layout
from dinoreg.train.prediction import Prediction, predict
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import Schedules
from dinoreg.train.split import Split, split

GIB = 2**30
FEW_IMAGES = 8  # on a GPU at a time
MUCH_PADDING = 0.1


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that describe a cluster (world_size=1024, gpu=H200, ...), and the others."""
    keys = tuple(f"{field.name}=" for field in fields(ClusterConfig))
    return [word for word in words if word.startswith(keys)], [word for word in words if not word.startswith(keys)]


def print_scale(config: RunConfig, words: Sequence[str], console: Console | None = None) -> None:
    """Say how `config` would run on the cluster that the words describe. Raises ConfigError."""
    console = console or Console()
    cluster = load(ClusterConfig, None, words)
    check_share(config, cluster)
    predictions = [predict(config, mode, cluster) for mode in MODES]
    sources, note = _sources(config)
    for part in (
        _heading(config, cluster),
        _wrapping(predictions),
        _held(predictions),
        _busiest(predictions, cluster),
        _sent(predictions),
        _speed(config, predictions, cluster, _steps(config, sources)),
        _saved(predictions, cluster),
        _data(config, predictions, cluster, sources, note),
    ):
        part.print_to(console)


@dataclass(frozen=True)
class Section:
    """A table under its title, and what explains it."""

    title: str
    table: Table
    note: str = ""

    def print_to(self, console: Console) -> None:
        if self.title:
            console.print(f"[bold]{self.title}[/]")
        console.print(self.table)
        if self.note:
            console.print(f"[dim]{self.note}[/]")
        console.print()


def check_share(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError when the ranks cannot share the batch equally, with sizes at which they could."""
    world, batch, parts = cluster.world_size, config.train.batch_size, config.train.accumulate
    if batch % (world * parts) == 0:
        return
    nodes = range(cluster.gpus_a_node, batch // parts + 1, cluster.gpus_a_node)
    fitting = [n for n in (*range(1, cluster.gpus_a_node), *nodes) if batch % (n * parts) == 0]
    near = [max((n for n in fitting if n < world), default=0), min((n for n in fitting if n > world), default=0)]
    batches = {max(1, batch // (world * parts)) * world * parts, (batch // (world * parts) + 1) * world * parts}
    raise ConfigError(
        f"{world} ranks x train.accumulate {parts} do not divide train.batch_size {batch}; the nearest ranks that do: "
        f"{_and(n for n in near if n)}; the nearest batches for {world}: {_and(sorted(batches))}",
        key="world_size",
    )


def _sources(config: RunConfig) -> tuple[Sources | None, str]:
    """The sources, or why there are none: a plan can be made before the data are there."""
    if not config.data.sources:
        return None, "not given (data.sources=...)"
    try:
        return open_sources(config.data), ""
    except (ConfigError, OSError) as error:
        return None, f"cannot be read here ({error})"


def _steps(config: RunConfig, sources: Sources | None) -> int | None:
    """Of the whole run; None where that is counted in epochs of unknown length."""
    try:
        return Schedules(config, sources.num_samples if sources else None).total_steps
    except ConfigError:
        return None


# -- what is printed -------------------------------------------------------------------------------------------------


def _heading(config: RunConfig, cluster: ClusterConfig) -> Section:
    size, batch, world = config.model.size, config.train.batch_size, cluster.world_size
    parts = config.train.accumulate
    share = f"{batch // world} on each" + (f" in {parts} parts" if parts > 1 else "")
    table = _lines()
    table.add_row("ranks", f"{world:,} x {cluster.gpu}: {_count(cluster.nodes, 'node')} of {cluster.local_world}")
    table.add_row("network", f"{config.model.arch}/{config.model.patch_size}, {size.depth} blocks of {size.embed_dim}")
    table.add_row("images a step", f"{batch:,}, {share}")
    return Section("", table)


def _wrapping(predictions: Sequence[Prediction]) -> Section:
    table = _table("units", "shards", "replicas", "padding")
    for each in predictions:
        layout = each.layout
        students = sum(unit.network == "student" for unit in layout.units)
        units = f"{students} + {len(layout.units) - students}" if layout.units else "unwrapped"
        padding = f"{layout.padding:.1%}" if layout.units else "-"
        table.add_row(_name(each), units, f"{layout.shards:,}", f"{layout.replicas:,}", padding)
    note = "units: student + teacher; padding: what is gathered and nobody's weight"
    worst = max(predictions, key=lambda each: each.layout.padding if each.layout.units else 0.0)
    if worst.layout.units and worst.layout.padding > MUCH_PADDING:
        note += f"\nmost of it in {worst.mode}: {_most_padded(worst.layout)}"
    return Section("wrapping, by the real modules on the meta device", table, note)


def _most_padded(layout: Layout) -> str:
    """FSDP cuts the first dimension: of a tensor with one row, every rank sends a whole tensor's worth."""
    unit = max(layout.units, key=lambda unit: unit.shard * layout.shards - unit.whole)
    padded = unit.shard * layout.shards
    return f"{unit.name}, {padded / 1e6:,.1f} M numbers for {unit.whole / 1e6:,.1f} M, in tensors of few rows"


def _held(predictions: Sequence[Prediction]) -> Section:
    table = _table("rank", "weights", "gradients", "Adam", "teacher", "together")
    for each in predictions:
        shares = {"first": each.layout.first, "last": each.layout.last}
        for rank, held in shares.items() if each.layout.shards > 1 else [("all", each.layout.first)]:
            values = (held.weights, held.gradients, held.moments, held.teacher, held.total)
            table.add_row(_name(each) if rank != "last" else "", rank, *map(_size, values))
    return Section("bytes a rank between steps, counted", table)


def _busiest(predictions: Sequence[Prediction], cluster: ClusterConfig) -> Section:
    columns = (
        "held",
        "gathered",
        "buffer",
        "activations",
        "logits",
        "together",
        f"of {cluster.machine.memory / GIB:.0f}",
    )
    table = _table(*columns)
    for each in predictions:
        memory = each.memory
        parts = (each.layout.first.total, memory.gathered, each.buffer, memory.activations, memory.logits, each.needed)
        verdict = "fits" if each.fits(cluster) else "[red]too much[/]"
        table.add_row(_name(each), *(f"{value / GIB:.2f}" for value in parts), verdict)
    return Section("GiB on the first rank at the busiest moment, estimated but for 'held'", table)


def _sent(predictions: Sequence[Prediction]) -> Section:
    columns = ("all-gather", "reduce-scatter", "all-reduce", "across nodes", "calls", "ms")
    table = _table(*columns)
    for each in predictions:
        sizes = [sum(m.count * m.size for m in each.moved if m.kind == kind) for kind in columns[:3]]
        cells = [f"{size / GIB:.2f}" for size in [*sizes, sum(m.across for m in each.moved)]]
        table.add_row(_name(each), *cells, f"{sum(m.count for m in each.moved):,}", f"{1e3 * each.time.sending:,.1f}")
    return Section(
        "collectives a step: GiB of whole buffers on each rank",
        table,
        "across nodes: what each GPU's network adapter takes in",
    )


def _speed(config: RunConfig, predictions: Sequence[Prediction], cluster: ClusterConfig, steps: int | None) -> Section:
    columns = ("step", "computing", "waiting", "images/s", "a GPU", "of one node's", "hours")
    table = _table(*columns)
    for each in predictions:
        time, rate = each.time, config.train.batch_size / each.time.total
        table.add_row(
            _name(each),
            *(f"{1e3 * value:,.1f}" for value in (time.total, time.computing, time.waiting)),
            f"{rate:,.0f}",
            f"{rate / cluster.world_size:.1f}",
            f"{each.one_node.total / time.total:.0%}",
            "?" if steps is None else f"{steps * time.total / 3600:,.1f}",
        )
    note, images = assumptions(cluster), config.train.batch_size // cluster.world_size // config.train.accumulate
    if images < FEW_IMAGES:
        note += f"\n[/][yellow]careful:[/][dim] {_count(images, 'image')} at a time keep no GPU that busy"
    return Section("time a step (ms), predicted", table, note)


def assumptions(cluster: ClusterConfig) -> str:
    """What the prediction of time rests on."""
    peak = cluster.rate / cluster.utilisation
    return (
        f"assuming {cluster.utilisation:.0%} of {peak / 1e12:.0f} TFLOP/s, {LINK_SHARE:.0%} of "
        f"{cluster.machine.nvlink / 1e9:.0f} GB/s NVLink and {cluster.network_bandwidth / 1e9:g} GB/s network a GPU, "
        f"{START * 1e6:.0f} us a collective, {HOP_INSIDE * 1e6:.0f} us a hop in a node, {HOP_ACROSS * 1e6:.0f} us "
        "between nodes; weights and gradients travel while the GPU computes; data keep up. A model, never compared "
        "with a cluster. 'of one node's': one node's images/s on each GPU, with as many images on it"
    )


def _saved(predictions: Sequence[Prediction], cluster: ClusterConfig) -> Section:
    columns = ("files", "smallest", "largest", "tensors", "pieces", "their table", "seconds")
    table = _table(*columns)
    for each in predictions:
        saved = each.saved
        sizes = (_size(saved.least), _size(saved.most), _size(saved.total))
        time = (saved.total + saved.table) / (cluster.disk * 1e9)
        table.add_row(_name(each), f"{saved.files:,}", *sizes, f"{saved.pieces:,}", _size(saved.table), f"{time:.1f}")
    return Section(
        "a checkpoint, by DCP's plans of the first and the last rank",
        table,
        f"seconds: at {cluster.disk:g} GB/s for all nodes together, planning left out",
    )


def _data(
    config: RunConfig, predictions: Sequence[Prediction], cluster: ClusterConfig, sources: Sources | None, note: str
) -> Section:
    table = _lines()
    share = config.train.batch_size // cluster.world_size
    table.add_row("a rank", f"{_count(share, 'image')} a step, from one order that all ranks share")
    rates = [config.train.batch_size / each.time.total / cluster.nodes for each in predictions]
    table.add_row("a node", f"decodes {min(rates):,.0f} to {max(rates):,.0f} images/s, by sharding mode")
    if sources is None:
        table.add_row("sources", note)
        return Section("data", table)
    dealt = split(sources, config, cluster.world_size)
    if dealt is None:
        table.add_row("sources", "streamed: each reader takes whole shards of a pass, and ranks may differ")
        return Section("data", table)
    for name, text in _dealt(dealt, config):
        table.add_row(name, text)
    return Section("data", table)


def _dealt(dealt: Split, config: RunConfig) -> Iterator[tuple[str, str]]:
    fewest, most = dealt.images
    steps = dealt.samples / config.train.batch_size
    yield "a pass", f"{dealt.samples:,} images, {steps:,.1f} steps, {fewest:,} to {most:,} images a rank"
    once = "each exactly once" if dealt.drawn == dealt.samples else "none twice"
    drawn = "all" if dealt.drawn == dealt.samples else f"the first {dealt.drawn:,}"
    yield "its order", f"{drawn} drawn: {once if dealt.once else '[red]some come twice[/]'}"
    if dealt.shards:
        yield "shards", f"{dealt.shards:,}, of which {dealt.open_at_once} are read at a time, by all ranks"
    if dealt.read:
        least, most = dealt.read
        yield "bytes", f"{_size(least)} to {_size(most)} a rank, over the steps drawn"


def _lines() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(each: Prediction) -> str:
    return f"{each.mode} *" if each.chosen else each.mode


def _size(value: float) -> str:
    """Three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
        value /= 1024
    raise AssertionError


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _and(numbers: Iterable[int]) -> str:
    return " and ".join(str(number) for number in numbers)
