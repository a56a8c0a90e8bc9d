"""Streams: order, sharing out, failures of commands, names that lead out of a tar."""

from __future__ import annotations

import gzip
import os
import resource
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_data_sources import write_shards, write_tar

from dinoreg.data.images import REASONS, BadImage, DataError
from dinoreg.data.remote import Command, Patience, open_remote
from dinoreg.data.sources import DataConfig, Reader, open_sources
from dinoreg.data.streams import Stream, read_shard

SOON = Patience(timeout=0.5, tries=3, wait=0.01)


def test_streams_read_everything_once_a_pass(tmp_path) -> None:
    write_shards(tmp_path, [20, 20, 20, 20])
    packed = tmp_path / "s-000.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    urls = [str(packed)] + [f"pipe:cat {tmp_path}/s-00{i}.tar" for i in (1, 2, 3)]
    for consumers in (1, 2, 8):
        found: list[int] = []
        for consumer in range(consumers):
            stream = Stream(urls, buffer=1, key=3, consumer=consumer, consumers=consumers)
            found += [int(stream.next().read()) for _ in range(80 // consumers - 1)]
        assert len(found) == len(set(found)) == 80 - consumers  # all but the one that each still holds


def test_streams_are_shuffled_and_repeatable(tmp_path) -> None:
    write_shards(tmp_path, [50, 50])
    cfg = DataConfig(sources=[f"pipe:cat {tmp_path}/s-00{{0,1}}.tar"], stream_buffer=20)
    sources = open_sources(cfg)
    assert sources.num_samples is None

    def first(seed: int) -> list[int]:
        reader = Reader(sources, seed)
        return [int(reader.entry(g).read()) for g in range(60)]

    assert first(0) == first(0) != first(7)
    assert first(0) != sorted(first(0))


def test_a_failing_stream_is_reported_and_the_others_go_on(tmp_path) -> None:
    write_shards(tmp_path, [10])
    stream = Stream(["pipe:exit 3", f"pipe:cat {tmp_path}/s-000.tar"], buffer=1, key=0, consumer=0, consumers=1)
    entries = [stream.next() for _ in range(30)]
    failed = [entry for entry in entries if isinstance(entry.data, BadImage)]
    assert failed and len(failed) < 5
    assert failed[0].data.reason == "unreachable" and failed[0].where()[0] == "pipe:exit 3"


def test_streams_that_give_nothing_end_the_run() -> None:
    stream = Stream(["pipe:exit 3"], buffer=1, key=0, consumer=0, consumers=1)
    with pytest.raises(DataError, match="no image in any of 1 streamed shards, as pipe:exit 3"):
        for _ in range(5):
            stream.next()


def test_streams_smaller_than_the_buffer_are_read_once_a_pass(tmp_path) -> None:
    write_shards(tmp_path, [12])
    stream = Stream([f"pipe:echo >> {tmp_path}/reads; cat {tmp_path}/s-000.tar"], 1000, key=0, consumer=0, consumers=1)
    passes = [[int(stream.next().read()) for _ in range(12)] for _ in range(2)]
    assert [sorted(each) for each in passes] == [list(range(12))] * 2 and passes[0] != passes[1]
    assert (tmp_path / "reads").read_text().count("\n") == 2


def test_more_readers_than_streamed_images(tmp_path) -> None:
    write_shards(tmp_path, [3])
    stream = Stream([f"pipe:cat {tmp_path}/s-000.tar"], 1000, key=0, consumer=3, consumers=4)
    with pytest.raises(DataError, match="3 streamed images are too few for 4 readers"):
        stream.next()


@pytest.mark.parametrize(("sizes", "consumers"), [([1, 5], 6), ([1, 1, 1], 3), ([3, 3], 6), ([2, 9], 5)])
def test_no_reader_of_small_shards_is_left_without_images(tmp_path, sizes, consumers) -> None:
    write_shards(tmp_path, sizes)
    urls = [f"pipe:cat {tmp_path}/s-{i:03d}.tar" for i in range(len(sizes))]
    streams = [Stream(urls, 1, key=5, consumer=c, consumers=consumers) for c in range(consumers)]
    assert {int(stream.next().read()) for stream in streams for _ in range(8)} == set(range(sum(sizes)))


def test_a_shard_that_fails_for_one_reader_does_not_shift_the_others(tmp_path) -> None:
    """With fewer shards than readers, which take turns by sample."""
    write_shards(tmp_path, [6, 6])
    command = f"pipe:test -e {tmp_path}/broken && exit 1; cat {tmp_path}/s-000.tar"
    urls = [command, f"pipe:cat {tmp_path}/s-001.tar"]
    found: list[int] = []
    for consumer in range(3):
        if consumer == 1:
            (tmp_path / "broken").touch()
        stream = Stream(urls, 100, key=0, consumer=consumer, consumers=3)
        entries = [stream.next() for _ in range(3 if consumer == 1 else 4)]
        found += [int(entry.read()) for entry in entries if not isinstance(entry.data, BadImage)]
        (tmp_path / "broken").unlink(missing_ok=True)
    assert len(found) == len(set(found)) == 10 and set(range(6, 12)) <= set(found)


def test_members_that_lead_out_of_the_tar_are_refused_by_name(tmp_path) -> None:
    members = {
        "1.jpg": b"1",
        "/etc/2.jpg": b"2",
        "a/../../3.jpg": b"3",
        "a/4.jpg": b"4",
        "..": b"5",
        "b/../5.jpg": b"5",
    }
    path = write_tar(tmp_path / "t.tar", members)
    found = list(read_shard(f"pipe:cat {path}", SOON))
    assert [(key, data) for key, data in found if isinstance(data, bytes)] == [("1", b"1"), ("a/4", b"4")]
    refused = [(key, data.reason) for key, data in found if isinstance(data, BadImage)]
    assert refused == [(key, "unsafe-path") for key in ("/etc/2.jpg", "a/../../3.jpg", "..", "b/../5.jpg")]
    assert "unsafe-path" in REASONS


def ends(command: str) -> bool:
    """Whether no process of this command line is left, soon."""
    for _ in range(200):
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                lines.append(file.read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace"))
        if command not in lines:
            return True
        time.sleep(0.05)
    return False


def failure(url: str) -> str:
    """The one reason with which a shard breaks off."""
    (data,) = [data for _, data in read_shard(url, SOON) if isinstance(data, BadImage)]
    assert data.reason == "unreachable" and "\n" not in str(data)
    return str(data)


def test_a_command_that_fails_is_named_with_its_exit_code(tmp_path) -> None:
    write_shards(tmp_path, [3])
    assert "pipe:exit 3: the command ended with exit code 3" in failure("pipe:exit 3")
    assert "signal 9" in failure("pipe:kill -9 $$")
    cut = f"pipe:head -c 3000 {tmp_path}/s-000.tar; exit 7"
    assert [data for _, data in read_shard(cut, SOON)][:2] == [b"0", b"1"] and "exit code 7" in failure(cut)


def test_a_tar_that_ends_in_the_middle_keeps_its_first_images(tmp_path) -> None:
    write_tar(tmp_path / "t.tar", {"1.jpg": b"x" * 600, "2.jpg": b"y" * 9000})
    os.truncate(tmp_path / "t.tar", 4000)
    found = list(read_shard(f"pipe:cat {tmp_path}/t.tar", SOON))
    assert found[0] == ("1", b"x" * 600)
    assert [data.reason for _, data in found[1:]] == ["unreachable"] and "unexpected end of data" in str(found[1][1])


def test_a_silent_command_is_ended_with_all_it_started(tmp_path) -> None:
    write_shards(tmp_path, [3])
    command = f"head -c 1536 {tmp_path}/s-000.tar; sleep 1234.5 | cat"
    began = time.monotonic()
    found = list(read_shard(f"pipe:{command}", SOON))
    assert time.monotonic() - began < 20
    assert found[0] == ("00000", b"0") and "no byte for 0.5 s" in str(found[1][1])
    assert ends("sleep 1234.5")


def test_a_command_that_goes_on_after_its_tar_does_not_hold_the_reader_up(tmp_path) -> None:
    write_shards(tmp_path, [3])
    began = time.monotonic()
    assert len(list(read_shard(f"pipe:cat {tmp_path}/s-000.tar; sleep 600", SOON))) == 3
    assert time.monotonic() - began < 20


def test_commands_of_webdataset_are_watched_too(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "gsutil"
    tool.write_text("#!/bin/sh\nprintf 'hello'; exec sleep 1234.25\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stream = open_remote("gs://bucket/x.tar", SOON)
    assert isinstance(stream, Command) and stream.read_some(100) == b"hello"
    with pytest.raises(OSError, match=r"gs://bucket/x\.tar: no byte for 0\.5 s"):
        stream.read(100)
    assert ends("sleep 1234.25")


def test_a_scheme_that_nobody_knows_is_one_line() -> None:
    assert "no gopen handler" in failure("ftp://host/x.tar")


def test_a_compressed_tar_that_trickles_in_is_recognised(tmp_path) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "s.tgz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    command = f"pipe:head -c 1 {tmp_path}/s.tgz; sleep 0.2; tail -c +2 {tmp_path}/s.tgz"
    assert [data for _, data in read_shard(command, SOON)] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(("kind", "reason"), [(tarfile.REGTYPE, "too-large"), (tarfile.XHDTYPE, "unreachable")])
def test_absurd_sizes_are_not_read_into_memory(tmp_path, kind, reason) -> None:
    member = tarfile.TarInfo("huge.jpg")
    member.size, member.type = 1 << 40, kind
    (tmp_path / "t.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    path = write_tar(tmp_path / "first.tar", {"1.jpg": b"1"})
    command = f"pipe:head -c 1024 {path}; cat {tmp_path}/t.tar; head -c 40000000 /dev/zero"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (key, data), *refused = read_shard(command, SOON)
    assert (key, data) == ("1", b"1") and refused[0][1].reason == reason and "huge.jpg" in "".join(map(str, refused[0]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB
