"""Other libraries where they do not find what they expect."""

from __future__ import annotations

import sys

import torch

_declarations: list[torch.library.Library] = []  # a declaration lives as long as its Library


def allow_torchvision() -> None:
    """Make `import torchvision` pass beside a torch without its C++ operators; timm and transformers import it."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.append(library)
    except ImportError:
        pass
