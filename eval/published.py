"""Figures from papers, with their sources, beside which ours are set."""

from __future__ import annotations

from dataclasses import dataclass

LINEAR, KNN, ADE, ADE_MS = "imagenet-linear/top1", "knn/top1", "ade20k-linear/miou", "ade20k-ms/miou"
NYUD1, NYUD4 = "nyud-linear/rmse_lin1", "nyud-linear/rmse_lin4"


@dataclass(frozen=True)
class Source:
    """Where figures were read. remark: what a reader must know of them."""

    short: str
    full: str
    remark: str = ""


REGISTERS = Source(
    "Registers, Table 2",
    "Darcet et al., Vision Transformers Need Registers (ICLR 2024), Table 2a; arXiv 2309.16588",
    "Models that the authors trained for the paper: DeiT-III ViT-B and DINOv2 ViT-L/14 on ImageNet-22k, OpenCLIP "
    "ViT-B/16 on a licensed text-image corpus. Whether NYUd is of one block or of four is not said; by their size the "
    "figures are of one.",
)
CARD = Source(
    "DINOv2 model card",
    "DINOv2's MODEL_CARD.md, weights pretrained on LVD-142M; ADE20k is +ms, NYUd is of four blocks",
)
PAPER = Source(
    "DINOv2 paper",
    "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision (TMLR 2024); arXiv 2304.07193",
)
TESTTIME = Source(
    "Jiang et al.",
    "Jiang et al., Vision Transformers Don't Need Trained Registers (NeurIPS 2025); arXiv 2506.08010",
    "Others' measurements of the released weights, means of three seeds.",
)
DVT = Source(
    "DVT",
    "Yang et al., Denoising Vision Transformers (ECCV 2024), the tables in the code's README; arXiv 2401.02957",
    "Others' measurements of the released weights.",
)


@dataclass(frozen=True)
class Published:
    """A row. scores: by suite/score; in percent, or in metres."""

    model: str
    registers: int
    source: Source
    scores: dict[str, float]


def _table2(model: str, registers: int, linear: float, ade: float, nyud: float) -> Published:
    return Published(model, registers, REGISTERS, {LINEAR: linear, ADE: ade, NYUD1: nyud})


def _card(size: str, knn: float, linear: float, ade_ms: float, nyud4: float) -> Published:
    return Published(f"DINOv2 ViT-{size}/14", 0, CARD, {KNN: knn, LINEAR: linear, ADE_MS: ade_ms, NYUD4: nyud4})


def _card_registers(size: str, knn: float, linear: float) -> Published:
    return Published(f"DINOv2 ViT-{size}/14", 4, CARD, {KNN: knn, LINEAR: linear})


def _paper(size: str, ade: float, nyud1: float, nyud4: float) -> Published:
    return Published(f"DINOv2 ViT-{size}/14", 0, PAPER, {ADE: ade, NYUD1: nyud1, NYUD4: nyud4})


def _dvt(size: str, registers: int, ade: float, nyud1: float) -> Published:
    return Published(f"DINOv2 ViT-{size}/14", registers, DVT, {ADE: ade, NYUD1: nyud1})


PUBLISHED = [
    _table2("DeiT-III ViT-B", 0, 84.7, 38.9, 0.511),
    _table2("DeiT-III ViT-B", 4, 84.7, 39.1, 0.512),
    _table2("OpenCLIP ViT-B/16", 0, 78.2, 26.6, 0.702),
    _table2("OpenCLIP ViT-B/16", 4, 78.1, 26.7, 0.661),
    _table2("DINOv2 ViT-L/14 on IN-22k", 0, 84.3, 46.6, 0.378),
    _table2("DINOv2 ViT-L/14 on IN-22k", 4, 84.8, 47.9, 0.366),
    _card("S", 79.0, 81.1, 47.2, 0.417),
    _card_registers("S", 79.1, 80.9),
    _card("B", 82.1, 84.5, 51.3, 0.362),
    _card_registers("B", 82.0, 84.6),
    _card("L", 83.5, 86.3, 53.1, 0.333),
    _card_registers("L", 83.8, 86.7),
    _card("g", 83.5, 86.5, 53.0, 0.298),
    _card_registers("g", 83.7, 87.1),
    _paper("S", 44.3, 0.449, 0.417),
    _paper("B", 47.3, 0.399, 0.362),
    _paper("L", 47.7, 0.384, 0.333),
    _paper("g", 49.0, 0.344, 0.298),
    Published("DINOv2 ViT-L/14", 0, TESTTIME, {LINEAR: 86.36, ADE: 48.27, NYUD1: 0.3876}),
    Published("DINOv2 ViT-L/14", 4, TESTTIME, {LINEAR: 86.69, ADE: 49.07, NYUD1: 0.3823}),
    _dvt("S", 0, 44.05, 0.4340),
    _dvt("S", 4, 44.36, 0.4328),
    _dvt("B", 0, 47.02, 0.3965),
    _dvt("B", 4, 47.73, 0.3967),
    _dvt("L", 0, 47.53, 0.3831),
    _dvt("L", 4, 48.44, 0.3852),
]
