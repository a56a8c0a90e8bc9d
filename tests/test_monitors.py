"""Each monitor against a slow float64 reference, and on inputs whose answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.parallel.mesh import Ranks
from dinoreg.train import monitors
from dinoreg.train.monitors import MonitorConfig, measure, rankme

ALONE = Ranks.alone()
REGISTERS, PATCHES = 2, 9


def make_observation(samples: int = 24, width: int = 16, prototypes: int = 40, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SimpleNamespace(
        teacher_cls=normal(samples, width) + 0.5,
        student_cls=normal(samples, width),
        tokens_prenorm=normal(samples, 1 + REGISTERS + PATCHES, width).exp(),
        num_registers=REGISTERS,
        dino_targets=(torch.linspace(0.1, 4, prototypes) * normal(samples, prototypes)).softmax(1),
        dino_cross_entropy=torch.tensor(5.5),
    )


def reference(seen: SimpleNamespace, outlier_norm: float) -> dict[str, float]:
    """The same, one number at a time."""
    targets = seen.dino_targets.double().numpy()
    teacher, student = seen.teacher_cls.double().numpy(), seen.student_cls.double().numpy()
    samples, prototypes = targets.shape
    mean = targets.mean(0)
    entropy = np.mean([-sum(t * math.log(t) for t in row if t > 0) for row in targets])
    marginal = -sum(m * math.log(m) for m in mean)
    information = [
        sum(targets[i, k] * math.log(targets[i, k] / mean[k]) for i in range(samples)) / samples
        for k in range(prototypes)
    ]
    total = sum(information)
    dead = (
        sum(i < 0.25 * m * total or m < 0.01 / prototypes for i, m in zip(information, mean, strict=True)) / prototypes
    )

    unit = teacher / np.sqrt((teacher**2).sum(1, keepdims=True))
    pairs = [unit[i] @ unit[j] for i in range(samples) for j in range(samples) if i != j]
    singular = np.linalg.svd(teacher, compute_uv=False)
    share = singular / singular.sum() + 1e-7

    norms = np.sqrt((seen.tokens_prenorm.double().numpy() ** 2).sum(-1))
    patches = norms[:, 1 + REGISTERS :].ravel()
    cutoff = outlier_norm or patches.mean() + 3 * patches.std(ddof=1)
    return {
        "teacher/entropy": entropy,
        "teacher/marginal_entropy": marginal,
        "teacher/kl": 5.5 - entropy,
        "prototypes/perplexity": math.exp(marginal),
        "prototypes/dead_share": dead,
        "prototypes/samples": samples,
        "features/rankme": math.exp(-(share * np.log(share)).sum()),
        "features/rank_limit": min(teacher.shape),
        "features/cls_std": math.sqrt(
            np.mean([((t - teacher.mean(0)) ** 2).sum() for t in teacher]) / np.mean([t @ t for t in teacher])
        ),
        "features/cls_cosine": np.mean(pairs),
        "teacher/student_cosine": np.mean(
            [t @ s / math.sqrt((t @ t) * (s @ s)) for t, s in zip(teacher, student, strict=True)]
        ),
        "norms/patch_q50": np.quantile(patches, 0.5),
        "norms/patch_q90": np.quantile(patches, 0.9),
        "norms/patch_q99": np.quantile(patches, 0.99),
        "norms/patch_max": patches.max(),
        "norms/outlier_share": np.mean(patches > cutoff),
        "norms/outlier_cutoff": cutoff,
        "norms/cls": norms[:, 0].mean(),
        **{f"norms/register_{i}": norms[:, 1 + i].mean() for i in range(REGISTERS)},
    }


@pytest.mark.parametrize("outlier_norm", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_monitor_equals_its_formula(outlier_norm: float, dtype: torch.dtype) -> None:
    seen = make_observation()
    for name, value in vars(seen).items():
        if isinstance(value, Tensor):
            setattr(seen, name, value.to(dtype))
    found = measure(seen, MonitorConfig(outlier_norm=outlier_norm), ALONE)
    expected = reference(seen, outlier_norm)
    assert found.keys() == expected.keys()
    assert 0 < expected["prototypes/dead_share"] < 1 and expected["norms/outlier_share"] > 0
    for name, value in expected.items():
        assert found[name].shape == () and not found[name].requires_grad
        assert float(found[name]) == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_more_rows_than_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = make_observation()
    monkeypatch.setattr(monitors, "ROWS", 6)
    found = measure(seen, MonitorConfig(), ALONE)
    assert float(found["features/rank_limit"]) == 6
    assert float(found["features/rankme"]) == pytest.approx(float(rankme(seen.teacher_cls[:6])))
    assert float(found["prototypes/samples"]) == 24  # targets are all used


def test_rankme_counts_the_directions_in_use() -> None:
    assert float(rankme(torch.eye(8))) == pytest.approx(8, rel=1e-5)
    assert float(rankme(torch.ones(8, 5))) == pytest.approx(1, rel=1e-4)
    assert float(rankme(torch.cat([torch.eye(3), torch.zeros(3, 7)], 1))) == pytest.approx(3, rel=1e-4)


def one_hot(labels: Tensor, prototypes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, prototypes).float()


@pytest.mark.parametrize(
    ("targets", "entropy", "marginal", "dead"),
    [
        (torch.full((8, 8), 1 / 8), math.log(8), math.log(8), 1.0),  # uniform: says nothing
        (one_hot(torch.zeros(8, dtype=torch.long), 8), 0.0, 0.0, 1.0),  # one-hot collapse
        (one_hot(torch.arange(8), 8), 0.0, math.log(8), 0.0),  # perfect
        (one_hot(torch.arange(8) % 2, 8), 0.0, math.log(2), 0.75),  # two prototypes alive
        # Four alive; the others take half of each sample's mass, as Sinkhorn would give them, but always the same.
        (
            0.5 * one_hot(torch.arange(8) % 4, 8) + torch.tensor([0.0] * 4 + [1 / 8] * 4),
            0.5 * math.log(2) + 0.5 * math.log(8),
            math.log(8),
            0.5,
        ),
    ],
    ids=["uniform", "one-hot", "perfect", "two-alive", "fed-by-sinkhorn"],
)
def test_known_targets(targets: Tensor, entropy: float, marginal: float, dead: float) -> None:
    found = monitors.target_statistics(targets, torch.tensor(3.0), ALONE)
    assert float(found["teacher/entropy"]) == pytest.approx(entropy, abs=1e-6)
    assert float(found["teacher/marginal_entropy"]) == pytest.approx(marginal, abs=1e-6)
    assert float(found["teacher/kl"]) == pytest.approx(3.0 - entropy, abs=1e-6)
    assert float(found["prototypes/dead_share"]) == dead


def test_constant_features_are_seen_as_such() -> None:
    seen = make_observation()
    seen.teacher_cls = torch.randn(1, 16).expand(24, 16)
    found = measure(seen, MonitorConfig(), ALONE)
    assert float(found["features/cls_cosine"]) == pytest.approx(1, abs=1e-6)
    assert float(found["features/cls_std"]) == pytest.approx(0, abs=1e-6)


def test_broken_numbers_are_reported_and_do_not_raise() -> None:
    seen = make_observation()
    seen.teacher_cls[3, 2] = math.nan
    found = measure(seen, MonitorConfig(), ALONE)
    assert math.isnan(float(found["features/rankme"])) and math.isnan(float(found["features/cls_std"]))


def test_weight_distance() -> None:
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    flat = [torch.cat([p.detach().flatten() for p in net.parameters()]).double() for net in (student, teacher)]
    expected = float((flat[0] - flat[1]).norm() / flat[0].norm())
    assert float(monitors.weight_distance(teacher, student, ALONE)) == pytest.approx(expected, rel=1e-6)
    assert float(monitors.weight_distance(student, student, ALONE)) == 0


def test_weight_distance_of_sharded_weights_moves_none(tmp_path: object) -> None:
    torch.multiprocessing.spawn(_sharded_distance, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2)]
    student, teacher = torch.arange(1.0, 6.0), torch.arange(1.0, 6.0) * 0.9
    for distance in found:
        assert float(distance) == pytest.approx(float((student - teacher).norm() / student.norm()), rel=1e-5)


def _sharded_distance(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    networks = []
    for factor in (1.0, 0.9):
        network = torch.nn.Module()
        network.weight = torch.nn.Parameter(distribute_tensor(factor * torch.arange(1.0, 6.0), mesh, [Shard(0)]))
        networks.append(network)
    ranks = Ranks(rank, 2, rank, 2, torch.device("cpu"))
    torch.save(monitors.weight_distance(networks[1], networks[0], ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _two_ranks(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = make_observation()
    part = slice(rank * 12, rank * 12 + 12)
    for name in ("teacher_cls", "student_cls", "tokens_prenorm", "dino_targets"):
        setattr(seen, name, getattr(seen, name)[part])
    found = measure(seen, MonitorConfig(), Ranks(rank, 2, rank, 2, torch.device("cpu")))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_see_what_one_sees(tmp_path: object) -> None:
    torch.multiprocessing.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    expected = measure(make_observation(), MonitorConfig(), ALONE)
    for rank in range(2):
        found = torch.load(f"{tmp_path}/{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name
