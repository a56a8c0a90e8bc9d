"""What is in the file of an offline wandb run: records of LevelDB's log format that hold protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768  # bytes; a record does not lie across two, but its parts do
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4


def sent_to_wandb(path: Path, name: str) -> dict[int, float]:
    """Step -> value of one metric."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name in line:
            found[int(line["step"])] = line[name]
    return found


def _records(data: bytes) -> Iterator[bytes]:
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
