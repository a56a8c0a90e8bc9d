"""A classifier of class tokens that is trained once and then held fixed, while something else is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.models.knn import knn_classify
from eval.images import hold_out
from eval.inside.artifacts.norms import finite
from eval.inside.look import Batch, Look
from eval.logistic import Linear, fit_logistic

GRID = (1e-3, 1e-2, 1e-1, 1.0)  # of C, for standardised features
HELDOUT = 0.1
MAX_ITER, TOL = 300, 1e-6
SMALLEST = 1e-6  # of a standard deviation, against channels that are always the same
K = 20  # neighbours


@dataclass
class Frozen:
    """predict: features (n, D) -> classes int64 (n,). kind: in words."""

    kind: str
    classes: int
    mean: Tensor
    scale: Tensor
    linear: Linear | None
    features: Tensor
    labels: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """In fp32, also inside of the network's lower precision."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.linear is None:
                return knn_classify(self.features, self.labels, features, k=K, num_classes=self.classes)
            return self.linear.predict((features - self.mean) * self.scale)

    def to(self, device: torch.device) -> Frozen:
        mean, scale, features, labels = (
            each.to(device) for each in (self.mean, self.scale, self.features, self.labels)
        )
        linear = self.linear and Linear(self.linear.weight.to(device), self.linear.bias.to(device))
        return Frozen(self.kind, self.classes, mean, scale, linear, features, labels)


def freeze(look: Look, kind: str, features_of: Callable[[Batch], Tensor] | None = None) -> Frozen | None:
    """Trained on features of the labelled training images; None where there are none, or of one class alone.

    kind: "logreg" or "knn". features_of: (B, D) of a batch, by default the class tokens after the final norm. For all
    ranks together; all get the same. Raises ConfigError where they are no numbers.
    """
    if look.train is None or look.num_classes < 2:
        return None
    measure = features_of or (lambda batch: look.backbone.layers(batch.images, [-1])[0].cls)

    def seen(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.places, finite(measure(batch).float()).cpu(), batch.labels

    mine = list(look.through(seen, "class tokens of training images", look.train))
    ranks = look.context.ranks
    gathered = [piece for share in ranks.gather_objects(mine) for piece in share]
    places, features, labels = (torch.cat([piece[at] for piece in gathered]) for at in range(3))
    order = places.argsort()  # the same however many ranks there are
    classes = look.num_classes
    frozen = ranks.from_main(lambda: train(features[order], labels[order], classes, kind))
    return frozen.to(look.context.device)


def train(features: Tensor, labels: Tensor, classes: int, kind: str) -> Frozen:
    """features (n, D) fp32 and labels int64 (n,), on the host."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    scale = 1 / std.clamp(min=SMALLEST)
    if kind == "knn":
        return Frozen(f"{K} nearest neighbours", classes, mean, scale, None, features, labels)
    standard = (features - mean) * scale
    C = _choose(standard, labels, classes)
    linear = fit_logistic(standard, labels, C, classes, max_iter=MAX_ITER, tol=TOL)
    nothing = features[:0], labels[:0]
    return Frozen(f"logistic regression, C = {C:g} of {len(GRID)} values", classes, mean, scale, linear, *nothing)


def _choose(features: Tensor, labels: Tensor, classes: int) -> float:
    """The C that is best on held-out training images; the smallest of equals."""
    held, kept = (torch.from_numpy(part) for part in hold_out(len(labels), HELDOUT, 0))
    best, most, start = GRID[0], -1.0, None
    for C in GRID:
        start = fit_logistic(features[kept], labels[kept], C, classes, max_iter=MAX_ITER, tol=TOL, start=start)
        right = float((start.predict(features[held]) == labels[held]).double().mean())
        if right > most:
            best, most = C, right
    return best
