"""`cost`: what registers add to the parameters and operations of a network (registers paper, appendix B)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from dinoreg.config import ConfigError
from dinoreg.models.vit import ModelConfig
from eval.backbone import Backbone
from eval.inside.cost.counting import Cost, cost_with, formula_increase
from eval.probe import choose_size
from eval.results import Result, Score
from eval.suite import Context

USUAL = 4  # registers of the paper's main results
PAPERS = ModelConfig(arch="vit_large", patch_size=14)  # whose cost the paper plots, on images of 224 pixels
PAPERS_SIZE = 224
AGREE = 1e-9  # relative difference of two counts that are the same


@dataclass
class CostConfig:
    """No image is looked at: operations depend on sizes alone."""

    image_size: int = 0  # pixels; 0 = 224, or what it was trained at where that is less
    registers: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])  # as in the paper's figure 12

    @staticmethod
    def quick() -> list[str]:
        return []

    def check(self) -> None:
        """Raises ConfigError."""
        if self.image_size < 0:
            raise ConfigError("must be at least 0", "image_size")
        if not self.registers or min(self.registers) < 0:
            raise ConfigError("numbers of registers, none negative", "registers")


def run(backbone: Backbone, cfg: CostConfig, context: Context) -> Result:
    """Every rank would count the same."""
    size, own = choose_size(backbone, cfg.image_size), backbone.num_registers
    asked = sorted({0, own, *cfg.registers})
    costs = context.ranks.from_main(lambda: [cost_with(backbone.model.config, number, size) for number in asked])
    details = {
        "costs": [asdict(cost) for cost in costs],
        "own": own,
        "image_size": size,
        "patches": (size // backbone.patch_size) ** 2,
        "paper": {"registers": asked, "increase": formula_increase(PAPERS, asked, PAPERS_SIZE)},
    }
    data = {"name": "no images", "path": "", "hash": "", "train": 0, "test": 0, "classes": 0, "bad": {}}
    return Result("cost", _scores(costs, own), {**asdict(cfg), "image_size": size}, data, _notes(costs), details)


def _scores(costs: list[Cost], own: int) -> dict[str, Score]:
    """Operations more than without registers, for the network's own number first. Counts are exact."""
    base = next(cost for cost in costs if not cost.registers)
    main = own or USUAL
    found = {}
    for cost in sorted(costs, key=lambda cost: (cost.registers != main, cost.registers)):
        if cost.registers:
            more = 100 * (cost.counted / base.counted - 1)
            found[f"flops_with_{cost.registers}"] = Score(more, more, more, "%", "lower")
    return found or {"flops_with_0": Score(0.0, 0.0, 0.0, "%", "lower")}


def _notes(costs: list[Cost]) -> list[str]:
    apart = max(abs(cost.counted / cost.formula - 1) for cost in costs)
    if apart < AGREE:
        return []
    return [f"fvcore's count and the formula differ by up to {100 * apart:.2g} %"]
