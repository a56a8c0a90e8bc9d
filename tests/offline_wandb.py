"""What is in the file of an offline wandb run: records of LevelDB's log format that hold protocol buffers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes; a record does not lie across two, but its parts do
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4


def sent_to_wandb(path: Path, name: str) -> dict[int, float]:
    """Step -> value of one metric, of a run that has finished: its service may still be writing."""
    deadline = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in _records(path)):
        assert time.monotonic() < deadline, f"{path} does not come to its end"
        time.sleep(0.2)
    found = {}
    for record in _records(path):
        line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name in line:
            found[int(line["step"])] = line[name]
    return found


def _records(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(data) for data in _whole(path.read_bytes())]


def _whole(data: bytes) -> Iterator[bytes]:
    position, whole = HEADER.size, b""  # the file's own header is as long as that of a part
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        whole += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield whole
            whole = b""
