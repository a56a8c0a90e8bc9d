"""lightly-train's DINOv2, timed from outside; run by a Python that has it installed, never by dinoreg's own.

    python theirs.py '{"data": DIR, "out": DIR, "epochs": 1, "steps": 6, "batch": 8, "precision": "32-true", ...}'

Prints, as its last line, what was measured as JSON. It touches nothing of the package: a callback notes the time at
which each training step ends. steps: in an epoch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import pairwise
from typing import Any

os.environ["XFORMERS_DISABLED"] = "1"  # its kernels want a GPU
os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"


def main() -> None:
    asked = json.loads(sys.argv[1])
    import lightly_train
    import pytorch_lightning
    import torch

    class Clock(pytorch_lightning.Callback):
        """Notes when the training begins and when each step ends."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            times.append(time.perf_counter())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            times.append(time.perf_counter())

    times: list[float] = []
    plain = pytorch_lightning.Trainer.__init__

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), Clock()]
        plain(self, *args, **kwargs)

    pytorch_lightning.Trainer.__init__ = timed
    lightly_train.pretrain(
        out=asked["out"], data=asked["data"], overwrite=True, num_workers=asked["workers"],
        accelerator="cpu", devices=1,
        model="dinov2/vits14-notpretrained", method="dinov2", method_args=asked["method"], optim_args=asked["optim"],
        batch_size=asked["batch"], precision=asked["precision"], seed=0, model_args=asked["model"],
        transform_args=asked["transform"] or None,
        epochs=asked["epochs"], trainer_args={"limit_train_batches": asked["steps"]},
    )  # fmt: skip
    if asked["export"]:
        lightly_train.export(
            out=asked["export"], checkpoint=f"{asked['out']}/checkpoints/last.ckpt", part="model",
            format="package_default", overwrite=True,
        )  # fmt: skip
    gaps = [after - before for before, after in pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": gaps, "peak": peak, "torch": torch.__version__, "version": lightly_train.__version__}))


if __name__ == "__main__":
    main()
