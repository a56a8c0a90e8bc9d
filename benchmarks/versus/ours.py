"""dinoreg's trainer, from files to updates, as `benchmarks.versus` runs it in a process of its own.

    python -m benchmarks.versus.ours '{"words": ["data.sources=DIR", ...]}'

Prints, as its last line, what was measured as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from dinoreg.config import load
from dinoreg.train.recipe import RunConfig
from dinoreg.train.tracking import read_metrics
from dinoreg.train.trainer import train


def main() -> None:
    asked = json.loads(sys.argv[1])
    config = load(RunConfig, asked["recipe"], ["train.log_every=1", *asked["words"]])
    weights = train(config)
    rates = [row["throughput/images_per_second"] for row in read_metrics(Path(config.run_dir) / "metrics.jsonl")
             if "throughput/images_per_second" in row]  # fmt: skip
    own, workers = (
        resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = {"seconds": [config.train.batch_size / rate for rate in rates], "peak": own, "peak_workers": workers}
    print(json.dumps({**found, "torch": torch.__version__, "weights": str(weights)}))


if __name__ == "__main__":
    main()
