"""The findings L1 to L8, D1, D3 and D7, as they are told and drawn side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.inside.decoupling import derived, parts, photos
from eval.inside.finding import Album, Finding, Seen


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """For one network or several side by side."""
    tellers: list[Callable[[Sequence[Seen], Album], Finding | None]] = [
        parts.tell_attention, parts.tell_longest, parts.tell_cka, parts.tell_one_shot, photos.tell_photos,
        derived.tell_norms, derived.tell_settling, derived.tell_skip,
        derived.tell_layers, derived.tell_rebuilding, derived.tell_clutter,
    ]  # fmt: skip
    return [finding for tell in tellers if (finding := tell(seen, album)) is not None]
