"""Checkpoints of somebody else: nothing in them is run."""

from __future__ import annotations

import os
import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpointing import Run
from torch.distributed.checkpoint.metadata import TensorProperties

from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from dinoreg.train.checkpoint_files import METADATA, SafeReader, TensorsOnly, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def saved(checkpointer: Checkpointer, tmp_path: Path) -> Path:
    Run(0).save(checkpointer, 1)
    checkpointer.wait()
    return tmp_path / "checkpoints" / "step_00000001"


def test_evil_metadata_is_refused_by_name_and_not_run(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (saved / METADATA).write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it names posix\.system"):
        read_metadata(saved)
    run = Run(1)
    with (
        closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer,
        pytest.raises(CheckpointError, match=r"cannot resume from .*it names posix\.system"),
    ):
        checkpointer.load(saved, run.objective, run.optimizer)
    assert not trace.exists()
    pickle.loads((saved / METADATA).read_bytes())
    assert trace.exists()  # it would have worked


def test_functions_of_torch_are_refused_as_well(saved: Path) -> None:
    for name in (b"ctorch\nload\n.", b"ctorch.distributed.checkpoint.metadata\nos.system\n.", b"cbuiltins\neval\n."):
        (saved / METADATA).write_bytes(name)
        with pytest.raises(ValueError, match="is refused: it names"):
            read_metadata(saved)


def test_checkpoints_of_early_python_3_11_are_read_and_getattr_gives_nothing_else(
    checkpointer: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a member of an Enum is pickled as getattr(class, name); Debian 12 has 3.11.2."""
    members = type(TensorProperties().__getstate__()[3])
    monkeypatch.setattr(members, "__reduce_ex__", lambda member, _: (getattr, (members, member.name)))
    Run(0).save(checkpointer, 1)
    checkpointer.wait()
    saved = tmp_path / "checkpoints" / "step_00000001"
    assert b"getattr" in (saved / METADATA).read_bytes()
    assert read_metadata(saved).state_dict_metadata
    for owner, name in ((members, b"mro"), (TensorProperties, b"__init__")):
        module = owner.__module__.encode()
        code = b"cbuiltins\ngetattr\n(c" + module + b"\n" + owner.__name__.encode() + b"\nV" + name + b"\ntR."
        (saved / METADATA).write_bytes(code)
        with pytest.raises(ValueError, match=f"is refused: it wants an attribute '{name.decode()}'"):
            read_metadata(saved)


def test_objects_in_place_of_tensors_are_refused(tmp_path: Path) -> None:
    """torch would open them with an unrestricted pickle."""
    trace = tmp_path / "trace"
    dcp.save({"objective.x": Evil(trace)}, checkpoint_id=tmp_path / "evil")
    metadata = pickle.loads((tmp_path / "evil" / METADATA).read_bytes())
    metadata.storage_meta = None
    (tmp_path / "evil" / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"is refused: .*BytesStorageMetadata"):
        SafeReader(tmp_path / "evil")
    reader = SafeReader.__new__(SafeReader)  # and if it came so far
    dcp.FileSystemReader.__init__(reader, tmp_path / "evil")
    reader.metadata = metadata
    with pytest.raises(BaseException, match=r"objective.x is refused"):
        dcp.load({"objective.x": torch.zeros(1)}, storage_reader=reader, planner=TensorsOnly())
    assert not trace.exists()


def test_evil_tensors_are_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "evil", tmp_path / "trace"
    dcp.save({"x": torch.zeros(4)}, checkpoint_id=folder)
    torch.save(Evil(trace), folder / "__0_0.distcp")
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.storage_meta = None
    (place,) = metadata.storage_data.values()
    place.length = (folder / "__0_0.distcp").stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match=r"[Ww]eights.only"):
        dcp.load({"x": torch.zeros(4)}, storage_reader=SafeReader(folder), planner=TensorsOnly())
    assert not trace.exists()


def test_data_outside_of_the_folder_are_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names \.\./\.\./secret, a file outside of its folder"):
        read_metadata(saved)
