"""The findings 1.1 to 1.6 and 1.12, as they are told and drawn side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.inside.artifacts.shown_norms import tell_layers, tell_norms, tell_types
from eval.inside.artifacts.shown_places import tell_neighbours, tell_places
from eval.inside.artifacts.shown_tokens import tell_probes, tell_single
from eval.inside.finding import Album, Finding, Seen

TELLERS: list[Callable[[Sequence[Seen], Album], Finding | None]] = [
    tell_norms, tell_layers, tell_neighbours, tell_probes, tell_single, tell_types, tell_places,
]  # fmt: skip


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """For one network or several side by side; what no network was measured for is left out."""
    return [finding for tell in TELLERS if (finding := tell(seen, album)) is not None]
