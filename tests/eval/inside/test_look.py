"""Images through a network, by one process or two, with bad ones among them; and the network taken apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from evaluating import surroundings, write_classes, write_data, write_weights
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.models.maps import attention_rows, query_key_value
from dinoreg.parallel.mesh import Ranks
from eval.backbone import open_backbone
from eval.inside.look import Batch, Look, LookConfig
from eval.inside.walk import walk
from eval.suite import Context, Place


def look_at(folder: Path, data: Path, cfg: LookConfig | None = None, ranks: Ranks | None = None) -> Look:
    backbone = open_backbone(write_weights(folder / f"small{(ranks or Ranks.alone()).rank}.safetensors"))
    return Look(backbone, cfg or LookConfig(batch=7), surroundings(folder, data, ranks))


def seen(batch: Batch) -> dict[int, float]:
    """The mean of each image by its place."""
    means = batch.pixels.float().mean((1, 2, 3))
    return dict(zip(batch.places.tolist(), means.tolist(), strict=True))


def all_seen(ranks: Ranks, folder: Path, data: Path) -> dict[int, float]:
    look = look_at(folder, data, ranks=ranks)
    mine = {place: mean for part in look.through(seen, "images") for place, mean in part.items()}
    return {place: mean for share in ranks.gather_objects(mine) for place, mean in share.items()}


def test_every_image_is_seen_once_whoever_sees_it(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 2, 5)
    alone = all_seen(Ranks.alone(), tmp_path, data)
    assert sorted(alone) == list(range(20))
    assert run_ranks(all_seen, 2, tmp_path, data) == [alone, alone]


def test_a_batch_is_normalised_and_knows_its_labels(tmp_path: Path) -> None:
    look = look_at(tmp_path, write_data(tmp_path / "data", 2, 5))
    assert look.labelled and look.num_classes == 4 and look.grid == (4, 4)
    batches = list(look.through(lambda batch: batch, "images"))
    assert [len(batch) for batch in batches] == [7, 7, 6]
    assert torch.cat([batch.labels for batch in batches]).tolist() == sorted([0, 1, 2, 3] * 5)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in look.backbone.normalisation)
    assert torch.allclose(batches[0].images * std + mean, batches[0].pixels / 255, atol=1e-6)


def test_a_plain_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 3)
    look = look_at(tmp_path, tmp_path / "data", LookConfig(images=5))
    assert not look.labelled and look.train is None and len(look.part) == 5
    result = look.result("artifacts", {}, arrays={"norms": torch.ones(2)}, more=1)
    assert result.data["train"] == 0 and result.data["classes"] == 0 and result.data["test"] == 5
    assert "5 of the 12 images" in result.notes[0] and result.details == {"more": 1}
    with pytest.raises(ConfigError, match="neither a folder nor"):
        Look(look.backbone, LookConfig(), Context(Ranks.alone(), Place.of(["images=nowhere"]), tmp_path, tmp_path))


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 3)
    (tmp_path / "data" / "class1" / "001.png").write_bytes(b"no image")
    look = look_at(tmp_path, tmp_path / "data", LookConfig(batch=4, max_bad_share=0.1))
    assert sum(len(batch) for batch in look.through(lambda batch: batch, "images")) == 11
    assert list(look.bad) == ["class1/001.png"] or "class1/001.png" in next(iter(look.bad))
    assert "1 images could not be read" in look.result("artifacts", {}).notes[-1]
    strict = look_at(tmp_path, tmp_path / "data", LookConfig(batch=4, max_bad_share=0.01))
    with pytest.raises(ConfigError, match="1 of 12 images cannot be read") as error:
        list(strict.through(seen, "images"))
    assert "\n" not in str(error.value)


def test_batches_are_halved_where_memory_is_short(tmp_path: Path) -> None:
    look = look_at(tmp_path, write_data(tmp_path / "data", 1, 5), LookConfig(batch=16))

    def greedy(batch: Batch) -> int:
        if len(batch) > 4:
            raise torch.OutOfMemoryError("as if")
        return len(batch)

    assert list(look.through(greedy, "images")) == [4, 4, 4, 4, 4]


def test_the_photos_are_the_same_for_every_network(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 4)
    Image.new("L", (8, 200)).save(tmp_path / "data" / "class0" / "long.png")
    pixels, names = look_at(tmp_path, tmp_path / "data", LookConfig(photos=3)).photos()
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.uint8
    again, same = look_at(tmp_path, tmp_path / "data", LookConfig(photos=3)).photos()
    assert names == same and torch.equal(pixels, again)
    assert len(look_at(tmp_path, tmp_path / "data", LookConfig(photos=0)).photos()[0]) == 0


def test_a_walk_takes_the_network_apart_and_loses_nothing(tmp_path: Path) -> None:
    model = open_backbone(write_weights(tmp_path / "small.safetensors")).model.double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    steps = list(walk(model, images))
    stream = [packing.split(x)[0] for x, packing in model.residual_stream(images)]
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, before, after in zip(steps, stream[:-1], stream[1:], strict=True):
        torch.testing.assert_close(step.entering, before, rtol=0, atol=1e-12)
        torch.testing.assert_close(step.leaving, after, rtol=0, atol=1e-12)
        # by hand: what attention adds
        q, k, v = step.query_key_value()
        mixed = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        added = step.block.ls1(step.block.attn.proj(mixed.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(step.attended, step.entering + added, rtol=0, atol=1e-12)
        for mine, others in zip((q, k, v), query_key_value(model, images, step.index), strict=True):
            assert torch.equal(mine, others)
    rows = steps[-1].attention(slice(0, 1 + model.num_registers))
    torch.testing.assert_close(rows.float(), attention_rows(model, images).transpose(1, 2))


def test_a_few_images_that_cannot_be_read_do_not_stop_a_step_that_is_shown_a_part(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 10)
    (tmp_path / "data" / "class0" / "000.png").write_bytes(b"no image")
    look = look_at(tmp_path, tmp_path / "data", LookConfig(max_bad_share=0.05))  # 1 of 40, but 1 of 4
    part = look.part.subset(np.arange(4))
    assert sum(map(len, look.through(lambda batch: batch, "some", part))) == 3
    assert sum(map(len, look.through(lambda batch: batch, "all"))) == 39 and len(look.bad) == 1
    with pytest.raises(ConfigError, match="1 of 1 images"):
        list(look.through(seen, "one", look.part.subset(np.arange(1))))


def test_attention_is_computed_in_fp32_where_the_network_is_not(tmp_path: Path) -> None:
    model = open_backbone(write_weights(tmp_path / "small.safetensors")).model
    with torch.autocast("cpu", torch.bfloat16):
        step = next(walk(model, 5 * torch.randn(2, 3, 32, 32)))
        q, k, _ = (part.double() for part in step.query_key_value())
        found = step.attention()
    torch.testing.assert_close(found.double(), (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), rtol=1e-5, atol=1e-7)
