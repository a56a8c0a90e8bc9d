"""A cluster that is not there, against sums made by hand and against what a real step sends."""

from __future__ import annotations

import io
import math
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from rich.console import Console
from tiny import split_crops, tiny_crops
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from benchmarks.volumes import Sent
from dinoreg.cli import main
from dinoreg.config import load
from dinoreg.data.sources import Reader, StoredEntry, open_sources
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.shard import parallelize
from dinoreg.train.cluster import (
    HOP_ACROSS,
    HOP_INSIDE,
    LINK_SHARE,
    START,
    ClusterConfig,
    Collective,
    collectives,
    seconds,
    step_time,
)
from dinoreg.train.layout import MODES, build, deal_pieces, lay_out, lay_out_first, pretended, save_plan
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.prediction import predict
from dinoreg.train.recipe import RunConfig
from dinoreg.train.scale import print_scale, split_words
from dinoreg.train.split import split

TINY = (
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=4",
    "model.image_size=16",
    "crops.global_size=16",
    "crops.local_size=8",
    "crops.local_count=3",
    "objective.dino.head.prototypes=70",
    "objective.dino.head.hidden_dim=48",
    "objective.dino.head.bottleneck_dim=12",
    "objective.ibot.head.prototypes=40",
    "objective.ibot.head.hidden_dim=32",
    "objective.ibot.head.bottleneck_dim=8",
    "train.steps=100",
    "train.batch_size=2048",
)


def tiny(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*TINY, *overrides])


# -- bytes -----------------------------------------------------------------------------------------------------------


def by_hand(config: RunConfig, shards: int, place: int) -> tuple[int, int]:
    """fp32 bytes of the student on one rank: everything, and what is trained. Rows are dealt from the front."""
    from dinoreg.parallel.mesh import Ranks

    everything = trained = 0
    for parameter in SelfDistillation(config.objective, config.model, Ranks.alone()).student.parameters():
        rows = len(parameter)
        each = math.ceil(rows / shards)
        mine = max(0, min(rows, (place + 1) * each) - place * each)
        size = 4 * mine * (parameter.numel() // rows)
        everything, trained = everything + size, trained + size * parameter.requires_grad
    return everything, trained


@pytest.mark.parametrize("world", [1, 8, 24, 1024])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_the_first_and_the_last_rank_are_those_summed_by_hand(mode: str, world: int) -> None:
    config = tiny("objective.dino.head.train_scale=false", "train.batch_size=3072")
    shards = {"full": world, "hybrid": min(8, world), "none": 1}[mode]
    layout, _ = lay_out(config, mode, world, min(8, world))
    assert (layout.shards, layout.replicas) == (shards, world // shards)
    for share, place in ((layout.first, 0), (layout.last, shards - 1)):
        everything, trained = by_hand(config, shards, place)
        assert share.weights == share.teacher == everything
        assert share.gradients == trained and share.moments == 2 * trained
        assert trained < everything or place > 70  # 70 lengths of prototypes are not trained


def test_units_hold_every_parameter_once_and_padding_is_what_ceiling_division_adds() -> None:
    config = tiny()
    layout = lay_out_first(config, "full", 24, 8)
    names = [unit.name for unit in layout.units if unit.network == "student"]
    assert names == ["backbone", "backbone.blocks.0", "backbone.blocks.1", "dino_head.mlp", "dino_head.last_layer"]
    whole, _ = by_hand(config, 1, 0)
    assert sum(4 * unit.whole for unit in layout.units) == 2 * whole
    last = layout.units[4]  # 70 prototypes of 12, and their lengths, over 24 ranks: 3 each
    assert (last.whole, last.shard) == (70 * 13, 3 * 13)
    assert 0.3 < layout.padding < 0.7  # tensors of few rows, such as the positions, are sent by every rank


def test_a_single_process_in_fp32_is_not_wrapped() -> None:
    config = tiny("train.precision=fp32")
    layout, saved = lay_out(config, "full", 1, 1)
    assert layout.units == [] and layout.first.weights == by_hand(config, 1, 0)[0]
    assert saved.files == 1 and saved.least == saved.most == saved.total


@pytest.mark.parametrize("fails", [False, True])
def test_pretending_leaves_no_trace(fails: bool) -> None:
    hook = sys.excepthook
    try:
        with pretended(3, 16, 8) as ranks:
            assert (ranks.rank, dist.get_rank(), dist.get_world_size()) == (3, 3, 16)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert not dist.is_initialized() and sys.excepthook is hook


# -- communication ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["efficiency.reshard=true"],
        ["efficiency.reshard=true", "train.accumulate=2"],
        ["train.accumulate=2", "objective.ibot.separate_head=true", "objective.targets.sinkhorn_iterations=2"],
        ["train.accumulate=2", "efficiency.reshard=false", "objective.koleo.group=2"],
        ["efficiency.reshard=false", "objective.targets.centering=centering", "train.precision=fp32"],
        ["objective.koleo.group=4", "efficiency.reshard=true", "efficiency.activation_checkpointing=full"],
        ["objective.koleo.weight=0", "objective.dino.weight=0", "efficiency.reshard=true", "train.accumulate=4"],
    ],
)
def test_what_is_predicted_is_what_a_real_step_sends(mode: str, overrides: list[str]) -> None:
    """The step runs for real, on tensors with memory; only the collectives of the fake group do nothing."""
    config = tiny("train.batch_size=16", *overrides)
    world, local_world = 4, 2
    expected = collectives(config, lay_out_first(config, mode, world, local_world), local_world)
    with pretended(1, world, local_world) as ranks:
        objective = SelfDistillation(config.objective, config.model, ranks, attention="sdpa")
        objective.init_weights()
        parallelize(
            objective.student,
            objective.teacher,
            replace(config.efficiency, shard=mode),  # type: ignore[arg-type]
            "fp32" if config.train.precision == "fp32" else "bf16",
            ranks,
        )
        parts = split_crops(tiny_crops(4), config.train.accumulate)
        for _ in range(2):  # what the first step leaves gathered must not make the second one cheaper
            with Sent() as sent:
                objective.forward_backward(parts, teacher_temperature=0.07, seed=0)
                objective.update_teacher(0.9)
            objective.zero_grad()
    assert sent.calls == sum((Counter({each.kind: each.count}) for each in expected), Counter())
    assert sent.bytes == sum((Counter({each.kind: each.count * each.size}) for each in expected), Counter())


# -- time ------------------------------------------------------------------------------------------------------------


def test_seconds_of_a_collective_follow_the_stated_model() -> None:
    cluster = ClusterConfig(world_size=64, gpu="H100", network=25.0)
    gather = Collective("all-gather", "forward", 3, 8_000_000_000, ranks=64, local=8, what="weights")
    hops = 56 * HOP_INSIDE + 7 * HOP_ACROSS
    inside, across = 8e9 * 63 / 64 / 450e9, 8e9 * 7 / 8 / (8 * 25e9)
    assert across > inside
    assert seconds(gather, cluster) == pytest.approx(3 * (START + hops + across / LINK_SHARE))
    faster = replace(cluster, network=100.0)
    assert seconds(gather, faster) == pytest.approx(3 * (START + hops + inside / LINK_SHARE))
    reduce = Collective("all-reduce", "backward", 1, 8_000_000_000, ranks=8, local=1, what="gradients")
    assert reduce.across == 2 * 8e9 * 7 / 8
    assert seconds(reduce, cluster) == pytest.approx(START + 6 * HOP_ACROSS + reduce.across / 25e9 / LINK_SHARE)


def test_a_single_gpu_waits_for_nobody() -> None:
    time = predict(load(RunConfig, "demo"), "full", ClusterConfig()).time
    assert time.sending == 0 and time.waiting == pytest.approx(0, abs=1e-12) and time.total > 0


def test_the_published_step_of_the_fast_setup() -> None:
    """About a day on 32 A100 for 125,000 steps: 0.69 s (DINOv2's README); the utilisation is assumed, not fitted."""
    config = load(RunConfig, "vitl16_short_in1k")
    cluster = ClusterConfig(world_size=32, gpu="A100")
    for mode in MODES:
        time = step_time(config, lay_out_first(config, mode, 32, 8), cluster, images=64)
        assert time.total == pytest.approx(0.69, rel=0.2)


# -- checkpoint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint_is_what_the_plans_of_all_ranks_amount_to(mode: str) -> None:
    config, world, local_world = tiny("objective.targets.centering=centering"), 4, 2
    _, saved = lay_out(config, mode, world, local_world)
    plans = []
    for rank in range(world):
        with pretended(rank, world, local_world) as ranks:
            plans.append(save_plan(build(config, mode, ranks), config, rank))
    final, metadata = DefaultSavePlanner().create_global_plan(plans)
    sizes = [sum(item.tensor_data.chunk.sizes.numel() * 4 for item in plan.items if item.tensor_data) for plan in final]
    assert sum(sizes) == saved.total
    assert max(sizes) == pytest.approx(saved.most, rel=0.02) and min(sizes) == pytest.approx(saved.least, abs=5000)
    assert sum(len(plan.items) for plan in final) == saved.pieces
    assert sum(bool(plan.items) for plan in final) == saved.files
    assert metadata.state_dict_metadata


def test_a_planned_optimizer_has_the_tensors_of_a_real_one() -> None:
    config = tiny("train.precision=fp32")
    with pretended(0, 1, 1) as ranks:
        plan = save_plan(build(config, "full", ranks), config, 0)
        student = SelfDistillation(config.objective, config.model, ranks).student
        state = get_optimizer_state_dict(student, Optimizer(student, config.optim).adamw)["state"]
    real = {f"optimizer.state.{name}.{key}": value.numel() for name in state for key, value in state[name].items()}
    data = {item.index.fqn: item.tensor_data for item in plan.items if item.index.fqn.startswith("optimizer.state.")}
    assert {name: each.size.numel() for name, each in data.items() if each} == real


def test_pieces_are_dealt_as_dcp_deals_them() -> None:
    config = tiny()
    with pretended(0, 16, 4) as ranks:
        plan = save_plan(build(config, "hybrid", ranks), config, 0)
    ours = [[item.index for item in mine] for mine in deal_pieces(plan.items, 4)]
    assert ours == [[item.index for item in other.items] for other in dedup_save_plans([plan] * 4)]


# -- data ------------------------------------------------------------------------------------------------------------


def write_shard(path: Path, sizes: list[int]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))


def test_the_order_of_real_shards_is_drawn_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(7):
        write_shard(tmp_path / f"{shard}.tar", rng.integers(1, 900, 30 + shard).tolist())
    config = tiny(f"data.sources={tmp_path}", "data.shuffle_window=3", "train.batch_size=16", "seed=5")
    sources, world = open_sources(config.data), 8
    dealt = split(sources, config, world)
    assert dealt is not None and dealt.once
    assert (dealt.samples, dealt.drawn, dealt.shards, dealt.open_at_once) == (231, 231, 7, 3)
    images, read = np.zeros(world, int), np.zeros(world, int)
    reader = Reader(sources, config.seed)
    for number in range(231):  # 14 steps of 2 images a rank, and 7 images of the next step
        rank = number % 16 // 2
        entry = reader.entry(number)
        assert isinstance(entry, StoredEntry)
        images[rank] += 1
        read[rank] += entry.source.sizes()[entry.index] if number < 224 else 0
    assert dealt.images == (images.min(), images.max()) == (28, 30)
    assert dealt.read == (read.min(), read.max())


def test_weighted_sources_are_looked_at_one_by_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [10] * 300)
    write_shard(tmp_path / "b.tar", [20] * 40)
    weighted = f"data.sources=[{{path: {tmp_path}/a.tar, weight: 1}}, {{path: {tmp_path}/b.tar, weight: 1}}]"
    dealt = split(open_sources((config := tiny(weighted, "train.batch_size=16")).data), config, 4)
    assert dealt is not None and dealt.once and dealt.samples == dealt.drawn == 340 and dealt.read is None


def test_streams_have_no_order_to_look_at() -> None:
    config = tiny("data.sources=http://example.org/{0..9}.tar")
    assert split(open_sources(config.data), config, 8) is None


# -- what is printed -------------------------------------------------------------------------------------------------


def printed(config: RunConfig, *words: str, width: int = 80) -> str:
    out = io.StringIO()
    print_scale(config, words, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("demo", ["world_size=1"]),
        ("own_images_8gpu", ["world_size=8", "gpu=A100"]),
        ("vits14_in1k", ["world_size=1024", "gpu=B200"]),
    ],
)
def test_pages_of_recipes_have_all_parts_and_no_broken_cell(recipe: str, words: list[str]) -> None:
    text = printed(load(RunConfig, recipe, ["model.depth=2"]), *words)
    for part in ("wrapping", "bytes a rank", "busiest moment", "collectives", "time a step", "a checkpoint", "data"):
        assert sum(line.startswith(part) for line in text.splitlines()) == 1 or part == "busiest moment" in text, part
    assert "never compared" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if line.split(" ")[0] in MODES]
    assert len(rows) == 18 and "\u2026" not in text
    assert len([row for row in rows if " * " in row]) == 6


def test_a_page_tells_what_does_not_fit() -> None:
    text = printed(load(RunConfig, "vitg14", ["model.depth=10"]), "world_size=8", "gpu=A100")
    assert text.count("too much") == 3


def test_data_of_a_page(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", [100] * 40)
    text = printed(tiny(f"data.sources={tmp_path}", "train.batch_size=16"), "world_size=8")
    assert "120 images, 7.5 steps, 14 to 16 images a rank" in text
    assert "all drawn: each exactly once" in text and "3, of which 3 are read at a time" in text


def test_words_of_a_cluster_are_told_from_options() -> None:
    words = ["train.steps=3", "world_size=1024", "gpu=H200", "gpus_a_node=4", "seed=1", "network=25"]
    assert split_words(words) == (["world_size=1024", "gpu=H200", "gpus_a_node=4", "network=25"], [words[0], words[4]])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--dry-run", "world_size=1000"],
            "nearest ranks that do: 768 and 1024; the nearest batches for 1000: 3000",
        ),
        (["--dry-run", "world_size=4096"], "nearest ranks that do: 3072; the nearest batches for 4096: 4096"),
        (
            ["--dry-run", "world_size=100"],
            "world_size: 100 are not whole nodes of gpus_a_node=8; the nearest are 96",
        ),
        (["--dry-run", "world_size=0"], "world_size: must be at least 1"),
        (["--dry-run", "world_size=8", "gpu=Z80"], "gpu: "),
        (["--dry-run", "world_size=8", "utilisation=2"], "utilisation: must be a share"),
        (["world_size=8"], "world_size: no such option"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "vitg14", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1
