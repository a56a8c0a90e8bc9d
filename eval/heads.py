"""Many linear classifiers trained side by side: every learning rate on every set of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoreg.parallel.mesh import Ranks
from eval.forward import PATCH_MEAN, cls_of

MOMENTUM = 0.9
INITIAL_STD = 0.01
ROWS = 2**26  # logits held at once: 256 MiB


@dataclass(frozen=True)
class FeatureSet:
    """What a classifier sees: class tokens of the last `layers` blocks, and perhaps the mean of the patch tokens."""

    layers: int
    avgpool: bool

    @property
    def names(self) -> list[str]:
        """The features, in the order in which they are put side by side."""
        return [cls_of(block) for block in range(self.layers, 0, -1)] + [PATCH_MEAN] * self.avgpool

    def of(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features (n, D) by name, side by side."""
        return torch.cat([features[name] for name in self.names], dim=1)

    def __str__(self) -> str:
        return f"{self.layers} class token{'s' * (self.layers > 1)}{' and mean patch token' * self.avgpool}"


class Heads:
    """Classifiers (learning rates L, classes K, features D) for each feature set, in fp32, the same on every rank.

    Their losses are added up and share nothing, so each learns as if it were alone: SGD with momentum 0.9, no decay.
    """

    def __init__(
        self, dims: Mapping[FeatureSet, int], rates: Sequence[float], classes: int, device: torch.device, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = classes
        self.rates = torch.tensor(rates, device=device)
        self.weights = {
            which: (INITIAL_STD * torch.randn(len(rates), classes, dim, generator=generator)).to(device)
            for which, dim in dims.items()
        }
        self.biases = {which: torch.zeros(len(rates), classes, device=device) for which in dims}
        self._speeds = {
            which: (torch.zeros_like(self.weights[which]), torch.zeros_like(self.biases[which])) for which in dims
        }

    @torch.no_grad()
    def step(self, features: Mapping[str, Tensor], labels: Tensor, factor: float, batch: int, ranks: Ranks) -> None:
        """One step of every classifier on this rank's share of a batch, all ranks together.

        features: (B, D) by name; labels: int64 (B,), negative where an image does not count; factor: what the learning
        rates are multiplied with now; batch: images of all ranks, by whose number the losses are divided.
        """
        rates = (factor * self.rates)[:, None, None]
        for which, weight in self.weights.items():
            inputs = which.of(features)
            errors = self._errors(which, inputs, labels) / batch
            gradient = ranks.sum_((errors.flatten(1).T @ inputs).view_as(weight))
            _descend(weight, gradient, self._speeds[which][0], rates)
            gradient = ranks.sum_(errors.sum(0))
            _descend(self.biases[which], gradient, self._speeds[which][1], rates[..., 0])

    def _errors(self, which: FeatureSet, inputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the sum of cross entropies with respect to the logits: (B, L, K)."""
        errors = self._logits(which, inputs).softmax(2)
        truth = labels.clamp(min=0)[:, None, None].expand(-1, errors.shape[1], 1)
        errors.scatter_add_(2, truth, errors.new_full(truth.shape, -1))
        return errors * (labels >= 0)[:, None, None]

    def _logits(self, which: FeatureSet, features: Tensor) -> Tensor:
        """(B, D) -> (B, L, K)."""
        weight = self.weights[which]
        return (features @ weight.flatten(0, 1).T).view(-1, *weight.shape[:2]) + self.biases[which]

    @torch.no_grad()
    def guesses(self, which: FeatureSet, features: Tensor, count: int) -> Tensor:
        """The classes with the highest scores, best first: (n, D) -> int64 (n, L, count)."""
        step = max(1, ROWS // self.biases[which].numel())
        return torch.cat([self._logits(which, rows).topk(count, dim=2).indices for rows in features.split(step)])

    def finite(self, which: FeatureSet) -> list[bool]:
        """Of each learning rate, whether its classifier has not diverged."""
        weight, bias = self.weights[which].flatten(1), self.biases[which]
        return (weight.isfinite().all(1) & bias.isfinite().all(1)).tolist()

    def state(self) -> dict[str, Any]:
        """All that changes, for a file."""
        parts = {"weight": self.weights, "bias": self.biases}
        found = {f"{which} {name}": values[which] for name, values in parts.items() for which in values}
        for which, (weight, bias) in self._speeds.items():
            found |= {f"{which} weight speed": weight, f"{which} bias speed": bias}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _descend(value: Tensor, gradient: Tensor, speed: Tensor, rate: Tensor) -> None:
    """A step of SGD with momentum, as torch.optim.SGD takes it."""
    speed.mul_(MOMENTUM).add_(gradient)
    value.sub_(rate * speed)
