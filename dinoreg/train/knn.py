"""The k-NN accuracy of the teacher on a labelled set, while it trains."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dinoreg.data.labelled import LabelledImages
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.data.workers import start_worker, worker_context
from dinoreg.models.knn import knn_classify
from dinoreg.models.vit import ModelConfig, VisionTransformer
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.monitors import MonitorConfig

logger = logging.getLogger("dinoreg")

BATCH = 64  # images a forward pass
WORTH_WORKERS = 2000  # images from which starting processes to decode them pays
REPORT_EVERY = 20.0  # seconds


class KnnMonitor:
    """Weighted k-NN on the teacher's class tokens, at the training resolution.

    Calling it with a backbone returns the top-1 accuracy, the same on every rank; all ranks must call it together.
    Every rank embeds an equal share of the images. Raises ValueError where `monitor.knn_train` cannot be used.
    """

    def __init__(self, cfg: MonitorConfig, model: ModelConfig, photometric: PhotometricConfig, ranks: Ranks) -> None:
        if cfg.knn_train is None:  # MonitorConfig.check has asked for it
            raise ValueError("monitor.knn_train names no labelled images")
        memory = LabelledImages(cfg.knn_train, model.image_size, model.in_channels)
        self.num_classes = int(memory.labels.max()) + 1
        self.train: Dataset[tuple[Tensor, int]] = memory
        self.test: Dataset[tuple[Tensor, int]]
        if cfg.knn_test is not None:
            self.test = LabelledImages(cfg.knn_test, model.image_size, model.in_channels, memory.classes)
        else:
            self.train, self.test = hold_out_fifth(memory)
        self.k, self.ranks = cfg.knn_k, ranks
        self.mean = torch.tensor(photometric.mean, device=ranks.device).view(1, -1, 1, 1)
        self.std = torch.tensor(photometric.std, device=ranks.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(self, backbone: VisionTransformer, on_batch: Callable[[], None] = lambda: None) -> float:
        """Top-1 accuracy of the features of `backbone`, a module that is whole on this rank, in eval mode.

        on_batch: called now and then, to tell others that this goes on.
        """
        features, labels = self._embed(backbone, self.train, on_batch)
        features, labels = self.ranks.gather(features), self.ranks.gather(labels)
        known = labels >= 0
        asked, truth = self._embed(backbone, self.test, on_batch)
        asked, truth = asked[truth >= 0], truth[truth >= 0]
        found = knn_classify(features[known], labels[known], asked, k=self.k, num_classes=self.num_classes)
        right = torch.stack([(found == truth).sum(), truth.new_tensor(len(truth))]).double()
        right = self.ranks.sum_(right)
        return float(right[0] / right[1])

    def _embed(
        self, backbone: VisionTransformer, images: Dataset[tuple[Tensor, int]], on_batch: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (n, D) and labels (n,) of this rank's share; padded with the label -1 to equal shares."""
        total = len(images)  # type: ignore[arg-type]
        share = -(-total // self.ranks.world)
        mine = list(range(self.ranks.rank, total, self.ranks.world))
        workers = min(8, len(os.sched_getaffinity(0)) // self.ranks.local_world) if total >= WORTH_WORKERS else 0
        context = worker_context() if workers else None
        loader = DataLoader(
            Subset(images, mine),
            BATCH,
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # or it would take a number from that of the training run
        )
        features = torch.zeros(share, backbone.embed_dim, device=self.ranks.device)
        labels = torch.full((share,), -1, device=self.ranks.device)
        done, reported = 0, time.monotonic()
        for pixels, classes in loader:
            place = slice(done, done + len(classes))
            features[place] = self._class_tokens(backbone, pixels)
            labels[place] = classes.to(labels.device)
            done += len(classes)
            on_batch()
            if time.monotonic() - reported > REPORT_EVERY and self.ranks.is_main:
                reported = time.monotonic()
                logger.info(f"k-NN: {done / share:.0%} of {total} images embedded")
        return features, labels

    def _class_tokens(self, backbone: VisionTransformer, pixels: Tensor) -> Tensor:
        device = self.ranks.device
        images = (pixels.to(device).float() / 255 - self.mean) / self.std
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return backbone.forward_features(images).cls.float()


def hold_out_fifth(images: LabelledImages) -> tuple[Subset[tuple[Tensor, int]], Subset[tuple[Tensor, int]]]:
    """Four fifths to remember and one to ask about, always the same."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    asked = max(1, len(order) // 5)
    return Subset(images, order[asked:]), Subset(images, order[:asked])
