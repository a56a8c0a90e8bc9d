"""Pretrain vision transformers with registers, and find out how good they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoreg.models.weights import load_backbone

__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    """Import torch only when a backbone is loaded, so that `dinoreg --help` answers at once."""
    if name == "load_backbone":
        from dinoreg.models.weights import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
