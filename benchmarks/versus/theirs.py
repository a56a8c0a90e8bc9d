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
from functools import partial
from itertools import pairwise
from typing import Any

os.environ["XFORMERS_DISABLED"] = "1"  # its kernels want a GPU
os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"


def main() -> None:
    asked = json.loads(sys.argv[1])
    import lightly_train
    import pytorch_lightning
    import torch
    from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import MemEffAttention
    from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import NestedTensorBlock as Block
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer

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
    torch.manual_seed(0)
    network = DinoVisionTransformer(block_fn=partial(Block, attn_class=MemEffAttention), **asked["network"])
    lightly_train.pretrain(
        out=asked["out"], data=asked["data"], overwrite=True, num_workers=asked["workers"],
        accelerator="cpu", devices=1,
        model=network, method="dinov2", method_args=asked["method"], optim_args=asked["optim"],
        batch_size=asked["batch"], precision=asked["precision"], seed=0,
        transform_args=asked["transform"],
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
