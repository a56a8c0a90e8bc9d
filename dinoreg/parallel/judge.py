"""What heartbeats tell: who is silent, and who keeps the others waiting. Without threads, stores or processes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STARTING = "starting"  # before the first mark: it may take hours to index shards, and only who dies is looked for
WITH_OTHERS = "waiting for the others"  # the mark of who has come as far as it can alone: never blamed for a stall
NAMED = 4  # ranks that a line names; a node that dies takes more with it
ADVICE = "The last checkpoint is whole; start again with the same command."
ALIVE, LOST, LEFT = b"+", b"!", b"."  # the first byte of a beat, so that 1,000 are read without parsing them


class Beat(NamedTuple):
    """What a rank says of itself. All times are its own."""

    number: int = 0  # so that each beat differs from the one before
    host: str = ""
    pid: int = 0
    step: int = 0
    doing: str = STARTING
    idle: float = math.inf  # seconds since the last mark
    why: str = ""  # the error of a rank that lost its peers or left

    def text(self, state: bytes) -> str:
        return state.decode() + json.dumps(self)

    def who(self, rank: int) -> str:
        return f"rank {rank} (pid {self.pid} on {self.host})" if self.pid else f"rank {rank}"

    def what(self) -> str:
        return f"{self.doing} (step {self.step})"


class Judge:
    """What the beats of some ranks, the first of all among them, say to their reader.

    Silence is counted by the reader's clock alone, from when a beat last changed: the clocks of machines differ.
    """

    def __init__(self, ranks: Sequence[int], *, beat: float, silence: float, stall: float) -> None:
        self.ranks, self.beat, self.silence, self.stall = ranks, beat, silence, stall
        self.keys = [f"beat/{rank}" for rank in ranks]
        self.values = dict.fromkeys(ranks, b"")
        self.changed = dict.fromkeys(ranks, 0.0)

    def __call__(self, values: Sequence[bytes], now: float, lost: bool = False) -> str:
        """A verdict, or nothing. values: beats as read; now: seconds; lost: the reader itself has lost a peer."""
        for rank, value in zip(self.ranks, values, strict=True):
            if value != self.values[rank]:
                self.values[rank], self.changed[rank] = value, now
        lost = lost or any(value.startswith(LOST) for value in values)
        return self._silent(now, lost) or (self._deserted() if lost else self._stalled())

    def present(self, now: float = 0.0, patience: float = math.inf) -> list[int]:
        """Ranks that have not left, and were heard of within `patience` seconds."""
        return [r for r in self.ranks if not self._left(r) and now - self.changed[r] <= patience]

    def alone(self, now: float = 0.0, patience: float = math.inf) -> bool:
        """Whether none but the first rank is present."""
        return not any(self.present(now, patience))

    def last_of(self, rank: int) -> Beat:
        value = self.values[rank]
        return Beat(*json.loads(value[1:])) if value else Beat()

    def _left(self, rank: int) -> bool:
        return self.values[rank].startswith(LEFT)

    def _silent(self, now: float, lost: bool) -> str:
        """Once a rank has lost a peer, who misses two beats is that peer: a process that lives misses one at most."""
        limit = 2.5 * self.beat if lost else self.silence
        present = self.present()
        if len(self.present(now, limit)) == len(present):
            return ""
        gone = [rank for rank in present if now - self.changed[rank] > limit - self.beat]  # all of a node that died
        age = max(now - self.changed[rank] for rank in gone)
        how = "gone: the connection broke, and" if lost else "dead or frozen:"
        last = self.last_of(gone[0]).what()
        return f"{self._names(gone)} {how} no sign of life for {age:.0f} s; last seen {last}. {ADVICE}"

    def _deserted(self) -> str:
        """Nobody is silent, yet a connection broke: who left with an error that the others did not share."""
        left = {rank: self.last_of(rank) for rank in self.ranks if self._left(rank)}
        return next((f"{beat.who(rank)} failed: {beat.why}" for rank, beat in left.items() if beat.why), "")

    def _stalled(self) -> str:
        """Nobody gets on: the ranks wait for those that are behind."""
        # The main rank alone sees all, and as it is seldom idle itself, it seldom looks further.
        if len(self.ranks) == 1 or self.last_of(0).idle <= self.stall:
            return ""
        beats = {rank: self.last_of(rank) for rank in self.present()}
        if any(beat.idle <= self.stall or beat.doing == STARTING for beat in beats.values()):
            return ""
        late = behind(beats)
        others = Counter(beat.what() for rank, beat in beats.items() if rank not in late)
        rest = f"; the others: {', '.join(what for what, _ in others.most_common(NAMED))}" if others else ""
        who, beat = self._names(late) if others else "every rank is", beats[late[0]]
        return f"{who} hanging, {beat.what()} for {beat.idle:.0f} s, and no rank makes progress{rest}. {ADVICE}"

    def _names(self, ranks: Sequence[int]) -> str:
        named = ", ".join(self.last_of(rank).who(rank) for rank in ranks[:NAMED])
        more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        return f"{named}{more} {'is' if len(ranks) == 1 else 'are'}"


def behind(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for: of the lowest step, and busy by themselves; of several things that these do,
    what the fewest do, then what was begun first. All of them where they all do the same."""
    lowest = min(beat.step for beat in beats.values())
    late = {rank: beat for rank, beat in beats.items() if beat.step == lowest}
    late = {rank: beat for rank, beat in late.items() if beat.doing != WITH_OTHERS} or late
    doings: dict[str, list[int]] = {}
    for rank, beat in late.items():
        doings.setdefault(beat.doing, []).append(rank)
    return min(doings.values(), key=lambda ranks: (len(ranks), -max(late[rank].idle for rank in ranks)))
