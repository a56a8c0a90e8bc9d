"""One piece of work, in the words of both trainers: a recipe of dinoreg, and the same as arguments of lightly-train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinoreg.config import load
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import to_steps

Precision = Literal["fp32", "bf16"]
# large: a real network, for time and memory. small: one that learns something within minutes.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "large": ("vits14_in1k", {"train.batch_size": 8, "objective.dino.head.prototypes": 65536}),
    "small": (
        "demo",
        {  # its width is one from which the number of heads follows, for files of weights do not say that
            "model.embed_dim": 192, "model.num_heads": 3, "photometric.brightness": 0.4, "photometric.contrast": 0.4,
            "photometric.saturation": 0.2, "photometric.grey": 0.2, "photometric.solarise": "[0.0,0.2,0.0]",
        },
    ),
}  # fmt: skip
# What both can do, where by default they would do different things.
COMMON = {
    "data.workers": 0, "train.images": "null", "objective.koleo.group": 0, "objective.targets.centering": "centering",
    "objective.ibot.separate_head": "false", "tracking.pictures_every": 0, "tracking.wandb": "disabled",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What both do. images: in the data folder, of which an epoch is made."""

    data: Path
    size: str
    precision: Precision
    images: int

    def ours(self, steps: int, run: Path) -> dict[str, Any]:
        """The arguments of benchmarks.versus.ours."""
        recipe, words = SIZES[self.size]
        every = {
            "run_dir": run, "data.sources": self.data, "train.steps": steps, "train.precision": self.precision,
            "checkpoint.every": steps, "monitor.every": steps, "photometric.blur": list(self.blur),
        }  # fmt: skip
        return {"recipe": recipe, "words": [f"{key}={value}" for key, value in (COMMON | words | every).items()]}

    def theirs(self, steps: int, out: Path, export: Path | None) -> dict[str, Any]:
        """The arguments of theirs.py."""
        asked = self.ours(steps, out)
        cfg = load(RunConfig, asked["recipe"], asked["words"])
        epochs = max(1, -(-steps * cfg.train.batch_size // self.images))
        return {
            "data": str(self.data), "out": str(out), "export": str(export or ""), "workers": 0,
            "epochs": epochs, "steps": -(-steps // epochs), "batch": cfg.train.batch_size,
            "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[self.precision],
            "network": _network(cfg), "method": _method(cfg, steps), "transform": self._transform(cfg),
            "optim": {"lr": cfg.optim.lr, "weight_decay": cfg.optim.weight_decay},
        }  # fmt: skip

    @property
    def blur(self) -> tuple[float, float, float]:
        """Probabilities as in lightly-train; none for images that are small as it is."""
        return (1.0, 0.1, 0.5) if self.size == "large" else (0.0, 0.0, 0.0)

    def _transform(self, cfg: RunConfig) -> dict[str, Any]:
        crops = cfg.crops
        local: dict[str, Any] = {"num_views": crops.local_count, "view_size": (crops.local_size,) * 2}
        transform: dict[str, Any] = {"image_size": (crops.global_size,) * 2, "local_view": local}
        if not any(self.blur):
            transform |= {"gaussian_blur": None, "global_view_1": {"gaussian_blur": None}}
            local["gaussian_blur"] = None
        return transform


def _network(cfg: RunConfig) -> dict[str, Any]:
    size, model = cfg.model.size, cfg.model
    return {
        "img_size": model.image_size, "patch_size": model.patch_size, "embed_dim": size.embed_dim, "depth": size.depth,
        "num_heads": size.num_heads, "num_register_tokens": model.num_registers, "init_values": model.layerscale,
        "drop_path_rate": model.drop_path, "drop_path_uniform": True, "block_chunks": 0,
        "interpolate_antialias": model.pos_antialias, "interpolate_offset": model.pos_offset,
    }  # fmt: skip


def _method(cfg: RunConfig, steps: int) -> dict[str, Any]:
    def duration(amount: int | float | str) -> int:
        return to_steps(amount, total=steps, batch_size=cfg.train.batch_size, num_samples=None)

    head, targets, teacher, optim = cfg.objective.dino.head, cfg.objective.targets, cfg.objective.teacher, cfg.optim
    return {
        "output_dim": head.prototypes, "hidden_dim": head.hidden_dim, "dino_bottleneck_dim": head.bottleneck_dim,
        "teacher_temp_start": targets.temperature_start, "teacher_temp_end": targets.temperature,
        "teacher_temp_warmup_steps": duration(targets.temperature_warmup),
        "momentum_start": teacher.momentum, "momentum_end": teacher.momentum_end,
        "koleo_loss_weight": cfg.objective.koleo.weight,
        "warmup_steps": duration(optim.warmup), "min_lr": optim.lr_end, "weight_decay_end": optim.weight_decay_end,
        "layerwise_decay": optim.layer_decay, "patch_embed_lr_multiplier": optim.patch_embed_lr,
        "reference_batch_size": optim.lr_reference_batch, "gradient_clip_val": optim.clip,
        "student_freeze_last_layer_steps": duration(optim.freeze_last_layer),
        "mask_probability": cfg.masks.probability, "mask_ratio_min": cfg.masks.ratio[0],
        "mask_ratio_max": cfg.masks.ratio[1],
    }  # fmt: skip
