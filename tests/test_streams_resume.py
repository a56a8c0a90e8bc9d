"""Streams go on by whole shards: no image of a pass is lost, only those of shards that were being read come again."""

from __future__ import annotations

import json
import logging
from collections import Counter

import numpy as np
import pytest
from test_data_loader import kill_a_worker, load, picture
from test_data_sources import write_shards, write_tar

from dinoreg.data.counter import Purpose, generator, make_key
from dinoreg.data.images import BadImage
from dinoreg.data.progress import Deal, Progress, deal_from, describe, merge_positions, rank_position
from dinoreg.data.sources import DataConfig, Reader, Sources, open_sources


def streamed(folder, sizes: list[int], buffer: int = 1) -> Sources:
    write_shards(folder, sizes)
    url = f"pipe:cat {folder}/s-{{000..{len(sizes) - 1:03d}}}.tar"
    return open_sources(DataConfig(sources=[url], stream_buffer=buffer))


def read(sources: Sources, counts: list[int], position: dict) -> tuple[list[int], dict]:
    """So many images by each of the readers, two a rank; what was read, and the position after it."""
    numbers: list[int] = []
    ranks: list[dict[int, Progress]] = []
    shards = len(sources.parts[0].urls)
    deal = deal_from(position, 0, shards, len(counts))
    for consumer, count in enumerate(counts):
        reader, way = Reader(sources, 0, consumer, len(counts), position), Progress()
        entries = [reader.entry(number) for number in range(count)]
        numbers += [int(entry.read()) for entry in entries]
        for done in reader.take_done():
            way.add(done.epoch, done.turn)
        ranks += [{}] if consumer % 2 == 0 else []
        ranks[-1][consumer] = way
    start = position.get("0")
    told = [json.loads(json.dumps({"0": rank_position(deal, start, readers)})) for readers in ranks]
    return numbers, json.loads(json.dumps(merge_positions(told)))


def passes_of_each_shard(position: dict) -> Counter[int]:
    """How often the position says that each shard was read to its end."""
    one = position["0"]
    done = Counter(dict.fromkeys(range(one["shards"]), one["pass"]))
    for epoch, runs in one["done"].items():
        order = generator(make_key(0, 0), Purpose.STREAM, int(epoch) + 1).permutation(one["shards"])
        done.update(int(order[place]) for first, end in runs for place in range(first, end))
    return done


@pytest.mark.parametrize("case", range(12))
def test_what_a_position_calls_done_was_read(tmp_path, case) -> None:
    """Interrupted again and again at random places, each time with another number of readers."""
    rng = np.random.default_rng(case)
    sizes = rng.integers(1, 7, size=int(rng.integers(2, 9))).tolist()
    sources = streamed(tmp_path, sizes, buffer=int(rng.integers(1, 6)))
    position: dict = {}
    seen: Counter[int] = Counter()
    for turn in range(6):
        readers = int(rng.integers(1, min(6, sum(sizes)) + 1))
        counts = rng.integers(0, 3 * sum(sizes) // readers, size=readers).tolist() if turn < 5 else [2 * sum(sizes)]
        numbers, position = read(sources, counts, position)
        seen.update(numbers)
        done = passes_of_each_shard(position)
        for number, shard in enumerate(np.repeat(np.arange(len(sizes)), sizes).tolist()):
            assert seen[number] >= done[shard], "an image was lost"
    assert done.total() > 0


def test_a_run_that_stops_between_shards_repeats_nothing(tmp_path) -> None:
    sources = streamed(tmp_path, [5] * 6)
    first, position = read(sources, [11], {})
    assert position == {"0": {"shards": 6, "pass": 0, "done": {"0": [[0, 2]]}}}
    # The eleventh image was of the third shard, one more of which lay in the buffer: these five are read again.
    rest, after = read(sources, [20], position)
    assert sorted(first[:10] + rest) == list(range(30)) and first[10] in rest
    assert after == {"0": {"shards": 6, "pass": 1, "done": {}}}


def test_only_the_shards_that_were_being_read_come_again(tmp_path) -> None:
    sources = streamed(tmp_path, [10] * 12)
    first, position = read(sources, [25, 18, 31], {})
    done = sum(end - begin for begin, end in position["0"]["done"]["0"])
    assert done == 2 + 1 + 3
    rest, after = read(sources, [30, 30], position)
    assert set(first + rest) == set(range(120)) and len(first + rest) == 74 + 60
    repeated = {number for number, times in Counter(first + rest).items() if times > 1}
    assert len({number // 10 for number in repeated}) == 3 and len(repeated) == 5 + 8 + 1
    assert after["0"]["pass"] == 1


def test_readers_in_different_passes(tmp_path) -> None:
    sources = streamed(tmp_path, [4] * 4)
    first, position = read(sources, [8, 21], {})
    assert position["0"]["pass"] == 1 and set(position["0"]["done"]) == {"1", "2"}
    # Two shards of the second pass are left, and of the third all but one.
    rest, after = read(sources, [8 + 12], position)
    assert after["0"]["pass"] == 3 and after["0"]["done"] == {}
    assert set(Counter(first + rest).values()) <= {3, 4} and len(first + rest) == 29 + 20


def test_fewer_shards_than_readers(tmp_path) -> None:
    sources = streamed(tmp_path, [9, 9])
    # All three are done with the first shard (of which each has three images), two of them with the second one.
    first, position = read(sources, [6, 6, 4], {})
    assert position["0"] == {"shards": 2, "pass": 0, "done": {"0": [[0, 1]]}}
    rest, after = read(sources, [9], position)
    assert set(first + rest) == set(range(18)) and after["0"]["pass"] == 1
    again = {number // 9 for number, times in Counter(first + rest).items() if times > 1}
    assert len(again) == 1


def test_a_remaining_pass_too_short_for_all_readers(tmp_path) -> None:
    sources = streamed(tmp_path, [3] * 8)
    _, position = read(sources, [3 * 7], {})
    _, after = read(sources, [3] * 4, position)
    assert after["0"]["pass"] == 1 and sum(end - begin for begin, end in after["0"]["done"]["1"]) == 3


def test_a_shard_that_cannot_be_read_is_not_waited_for(tmp_path) -> None:
    write_shards(tmp_path, [5])
    sources = open_sources(DataConfig(sources=[f"pipe:cat {tmp_path}/s-000.tar", "pipe:exit 1"], stream_buffer=1))
    reader, way = Reader(sources, 0), Progress()
    entries = [reader.entry(number) for number in range(18)]
    assert sum(isinstance(entry.data, BadImage) for entry in entries) in (2, 3)
    for done in reader.take_done():
        way.add(done.epoch, done.turn)
    assert way.epoch >= 2


def test_each_reader_has_its_share_of_many_passes() -> None:
    deal = Deal(shards=10, consumers=4)
    counts = np.zeros(4, int)
    for epoch in range(6):
        shares = [deal.share(deal.left(epoch), epoch, consumer) for consumer in range(4)]
        counts += [len(share) for share in shares]
        assert sorted(np.concatenate(shares).tolist()) == list(range(10))
        assert counts.max() - counts.min() <= 1


def test_positions_stay_small() -> None:
    """100,000 shards read by 512 readers in step."""
    deal = Deal(shards=100_000, consumers=512)
    ranks = []
    for rank in range(64):
        readers = {8 * rank + worker: Progress(3, set(range(90 + worker))) for worker in range(8)}
        ranks.append({"0": rank_position(deal, None, readers)})
    assert len(json.dumps(ranks[0])) < 1000
    merged = merge_positions(ranks)
    assert merged["0"]["pass"] == 3 and len(json.dumps(merged)) < 20_000
    left = deal_from(merged, 0, 100_000, 100).left(3)
    assert len(left) == 100_000 - sum(64 * (90 + worker) for worker in range(8))


def test_ranks_that_did_not_share_the_shards_out() -> None:
    ranks = [{"0": rank_position(Deal(8, consumers), None, {})} for consumers in (2, 3)]
    with pytest.raises(ValueError, match=r"set data\.workers"):
        merge_positions(ranks)
    assert merge_positions([{}, {}]) == {} and describe({}) == ""


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(10):
        names = {f"{number:03d}.png": picture(number) for number in range(12 * shard, 12 * shard + 12)}
        write_tar(folder / f"s-{shard}.tar", names)
    return f"pipe:cat {folder}/s-{{0..9}}.tar"


def keys_of(batches) -> list[int]:
    return [int(key) for batch in batches for _, key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_with_another_number_of_ranks_and_workers(url, workers, caplog) -> None:
    """120 images, 12 a step on two ranks; stopped after six steps, with a batch fetched ahead."""
    seen, positions = [], []
    for rank in range(2):
        loader = load(url, steps=20, rank=rank, world=2, workers=workers, stream_buffer=3)
        batches = iter(loader)
        fetched = [next(batches) for _ in range(7)]
        seen += keys_of(fetched[:6])
        positions.append(json.loads(json.dumps(loader.position(6))))
        ahead = loader.position()
        assert ahead["0"]["read"] != positions[-1]["0"]["read"] or not fetched[6].shards_done
        loader.close()
    merged = merge_positions(positions)
    with caplog.at_level(logging.INFO, "dinoreg"):
        rest = load(url, steps=20, start_step=6, stream_position=merged, workers=1, stream_buffer=3)
    assert "streams go on by whole shards: pass 1" in caplog.text
    for batch in rest:
        seen += keys_of([batch])
        if merge_positions([rest.position()])["0"]["pass"] == 1:
            break
    counts = Counter(seen)
    assert set(counts) == set(range(120)), "an image was lost"
    done = {place for first, end in merged["0"]["done"].get("0", []) for place in range(first, end)}
    repeated = {number // 12 for number, times in counts.items() if times > 1}
    assert len(repeated) <= 10 - len(done) + 1  # and the one with which the next pass has begun


def test_killed_workers_lose_nothing_of_a_stream(url) -> None:
    loader = load(url, steps=40, workers=2, stream_buffer=3)
    seen = []
    for step, batch in enumerate(loader):
        seen += keys_of([batch])
        if step in (2, 6):
            kill_a_worker(loader)
        if merge_positions([loader.position()])["0"]["pass"] == 1:
            break
    assert set(seen) == set(range(120)) and step < 24


def test_what_is_stored_has_no_position(tmp_path, caplog) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    loader = load(tmp_path, steps=1)
    assert len(list(loader)) == 1 and loader.position() == {}


def test_other_shards_begin_anew(url, caplog) -> None:
    position = {"0": {"shards": 99, "pass": 5, "done": {}}}
    loader = load(url, steps=2, stream_position=position)
    assert "data.sources streams 10 shards" in caplog.text
    assert len(list(loader)) == 2 and loader.position()["0"]["start"] is None
