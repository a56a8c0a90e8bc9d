"""Tars that are damaged or made to do harm: one line that names the place, in no time and little memory."""

from __future__ import annotations

import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from test_data_sources import write_tar

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.sources import DataConfig, open_sources

BLOCK = 512


def header(name: bytes = b"a.jpg", size: bytes = b"00000000005\0", kind: bytes = b"0") -> bytes:
    """A header block whose checksum is right, whatever it says."""
    block = bytearray(name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2 + size + b"0" * 11 + b"\0")
    block += b" " * 8 + kind + b"\0" * 100 + b"ustar\x0000"
    block = block.ljust(BLOCK, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % BLOCK)


def extended(records: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeaders/a", b"%011o\0" % len(records), kind) + padded(records)


def refusal(path: Path) -> str:
    """The line with which a tar is refused, which took no more memory than a few long names."""
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        tarindex.scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 500
    assert peak < 2**23
    return text


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg", "a/..", "/" + "x/" * 80 + "1.jpg"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_would_leave_their_folder_are_refused_by_name(tmp_path, name, format) -> None:
    path = write_tar(tmp_path / "t.tar", {"0.jpg": b"x", name: b"y"}, format)
    assert "not safe" in refusal(path) and repr(name[:90])[:-1] in refusal(path)
    (tmp_path / "out").mkdir()
    outer = write_tar(tmp_path / "out" / "outer.tar", {"inner.tar": path.read_bytes()}, format)
    assert "not safe" in refusal(outer)


def test_dots_within_a_name_are_no_parents(tmp_path) -> None:
    names = ["..a.jpg/1.jpg", "a../1.jpg", "./2.jpg", "a/./3.jpg", "x..jpg"]
    assert len(tarindex.scan(write_tar(tmp_path / "t.tar", dict.fromkeys(names, b"x"))).names) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(size=b"-0000000512\0"), "no valid header at byte 0"),  # a walk backwards, round and round
        (header(size=b"\xff" * 12), "no valid header at byte 0"),  # minus one in base 256
        (header(size=b"\x80" + b"\xff" * 11), "should have 309485009821345068724781055 bytes"),
        (header(size=b"77777777777\0"), "should have 8589934591 bytes"),
        (header(size=b"1_0\0") + b"x" * BLOCK, "no valid header at byte 0"),
        (header(kind=b"L", size=b"77777777777\0"), "should have 8589934591 bytes"),
        (extended(b"0 path=a.jpg\n") + header() + padded(b"abcde"), "no valid pax records at byte 512"),
        (extended(b"-3 path=a.jpg\n") + header() + padded(b"abcde"), "no valid pax records at byte 512"),
        (extended(b"99999 path=a.jpg\n"), "no valid pax records at byte 512"),
        (extended(b"\xff\xfe\0garbage"), "no valid pax records at byte 512"),
        (extended(b"16 size=-512000\n") + header(), "impossible size '-512000'"),
        (extended(b"16 size=notanum\n") + header(), "impossible size 'notanum'"),
        (extended(b"10 size=9\n") + header() + padded(b"abcde"), "impossible size '9'"),
        (extended(b"22 size=9999999999999\n") + header(), "should have 9999999999999 bytes"),
        (extended(b"30 size=999999999999999999999\n") + header(), "impossible size '999999999999999999999'"),
    ],
)
def test_absurd_headers(tmp_path, content, message) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_what_a_header_asks_for_is_not_read_blindly(tmp_path, kind) -> None:
    """The file is as large as it says (a sparse one costs nothing), so only a limit of our own protects the memory."""
    path = tmp_path / "t.tar"
    with path.open("wb") as file:
        file.write(header(kind=kind, size=b"40000000000\0"))
        file.truncate(2**33)
    assert "at byte 512 should have 4294967296 bytes" in refusal(path)


def test_tars_nested_hundreds_deep(tmp_path) -> None:
    path, inner = tmp_path / "t.tar", header() + padded(b"abcde")
    for _ in range(500):
        inner = header(b"a.tar", b"%011o\0" % len(inner)) + inner
    path.write_bytes(inner)
    assert "tars inside tars, more than 8 deep" in refusal(path)


def test_a_tar_that_ends_in_the_middle_says_what_to_do(tmp_path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y" * 700}).read_bytes()
    for size in (1, 300, 700, 1536 + 100, 1536 + 512 + 699):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError) as caught:
            open_sources(DataConfig(sources=[str(path)]))
        assert "cut off" in str(caught.value) and "dinoreg data prepare" in str(caught.value)
        assert "remove it" in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"")
    assert "is empty" in refusal(path) and "remove it" in refusal(path)


def test_whole_members_need_no_end_mark(tmp_path) -> None:
    path = write_tar(tmp_path / "t.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y" * 700})
    for size in (2 * 1536, 1536 + 512 + 700):  # to the end of the block, and of the bytes
        os.truncate(path, size)
        assert tarindex.scan(path).names == ["1.jpg", "2.jpg"]


def test_random_damage_gives_one_line_or_an_index_of_places_inside_the_file(tmp_path) -> None:
    """Headers of every kind, each with bytes changed and the checksum mended, so that the damage is looked at."""
    long = "x" * 90 + "/" + "y" * 60 + ".jpg"
    members = {"1.jpg": b"a" * 600, long: b"b" * 20, "été.png": b"c" * 10, "1.cls": b"7"}
    members["in.tar"] = write_tar(tmp_path / "in.tar", {"2.jpg": b"d", long: b"e"}, tarfile.PAX_FORMAT).read_bytes()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    seeds = [write_tar(tmp_path / f"{kind}.tar", members, kind).read_bytes() for kind in formats]
    rng, path, refused = np.random.default_rng(0), tmp_path / "t.tar", 0
    for turn in range(3000):
        content = bytearray(seeds[turn % 3])
        for _ in range(rng.integers(1, 4)):
            start = BLOCK * int(rng.integers(len(content) // BLOCK))
            _damage(content, start, rng)
        path.write_bytes(content)
        try:
            places = tarindex.scan(path).places
            assert (places[:, :2] >= 0).all() and (places[:, 0] + places[:, 1] <= len(content)).all()
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert 500 < refused < 2900  # the damage is neither harmless nor always seen at once


def _damage(content: bytearray, start: int, rng: np.random.Generator) -> None:
    """Changes a few bytes of a block, most often where a header's name, size, kind or prefix are."""
    fields = [(0, 100), (124, 136), (124, 136), (156, 157), (345, 500), (0, BLOCK)]
    first, last = fields[rng.integers(len(fields))]
    likely = b"0123456789 =-/.\0\x80\xff\nLxgK"
    for _ in range(rng.integers(1, 8)):
        content[start + int(rng.integers(first, last))] = likely[rng.integers(len(likely))]
    if content[start + 257 : start + 262] == b"ustar":
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + BLOCK])
