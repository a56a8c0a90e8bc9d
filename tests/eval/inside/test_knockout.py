"""Knock-outs, exchanges and masking on networks of which it is known what CLS reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import run_suite, surroundings, write_data
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.formats import IMAGENET
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.inside.knockout.edges import (
    CUT,
    EDGES,
    MEAN,
    NOISE,
    SHUFFLE,
    SWAP,
    WAYS,
    ZERO,
    Pass,
    Run,
    choose_donors,
    knocked_out,
    moments,
    plan,
    spread_layers,
)
from eval.inside.knockout.masking import (
    area,
    deletion,
    greyed,
    insertion,
    leave_one_out,
    random_orders,
    rank_correlation,
)
from eval.results import Result
from eval.suites.knockout import correlation_score

DIM, PATCH, SIZE = 32, 8, 32
COLOUR, HELD, TOLD, KIND = (
    slice(0, 3),
    slice(4, 7),
    slice(8, 11),
    slice(12, 15),
)  # of patches, registers, CLS; who is who


def relay(through: str = "registers") -> VisionTransformer:
    """CLS learns an image's mean colour in the last block: from two registers that took it up in the block before, or
    from the patches themselves. Each kind of token reads one kind alone."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        embed_dim=DIM, depth=3, num_heads=1, patch_size=PATCH, image_size=SIZE, num_registers=2, layerscale=0
    )
    model = build_vit(cfg)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        for block in model.blocks:
            block.norm1.weight.fill_(1), block.norm2.weight.fill_(1)
        model.patch_embed.proj.weight.zero_(), model.patch_embed.proj.bias.zero_()
        mean_std = torch.tensor(IMAGENET[1])
        for channel in range(3):
            model.patch_embed.proj.weight[channel, channel] = mean_std[channel] / PATCH**2 * 3
        model.pos_embed.zero_(), model.cls_token.zero_(), model.register_tokens.zero_()
        model.pos_embed[:, 1:, KIND.start] = 5.0
        model.register_tokens[..., KIND.start + 1] = 5.0
        model.cls_token[..., KIND.start + 2] = 5.0
        _read(model.blocks[1], 1, 0, COLOUR, HELD)
        if through == "registers":
            _read(model.blocks[2], 2, 1, HELD, TOLD)
        else:
            _read(model.blocks[2], 2, 0, COLOUR, TOLD)
    return model.eval().requires_grad_(False)


def _read(block: Any, reader: int, read: int, channels: slice, into: slice) -> None:
    """Tokens of the kind `reader` look at those of the kind `read`, with a weight of nearly 1 in all."""
    query, key, value = block.attn.qkv.weight.view(3, DIM, DIM)
    query[0, KIND.start + reader], key[0, KIND.start + read] = 20.0, 20.0
    for channel in range(3):
        value[channel, channels.start + channel] = 1.0
        block.attn.proj.weight[into.start + channel, channel] = 4.0


def coloured(count: int, seed: int = 0) -> Tensor:
    """Images (n, 3, S, S) of one colour each, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    return colours + 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)


def effects(model: VisionTransformer, images: Tensor, donors: Tensor, first: int) -> dict[tuple[str, str], Tensor]:
    """Cosine (B,) of CLS with the plain one, by edge and way, in one block."""
    plain, other = Pass.of(model, images), Pass.of(model, donors)
    usual = moments(model, images).usual()
    cls = model.norm(plain.tokens(-1)[:, 0])
    places = torch.arange(len(images))
    return {
        (each.edge, each.way): torch.cosine_similarity(knocked_out(model, plain, other, usual, each, places), cls)
        for each in plan(model.depth, model.num_registers, [first], 1)
        if (each.first, each.last) == (first, first)
    }


@pytest.mark.parametrize("through", ["registers", "patches"])
def test_cls_loses_what_it_read_and_nothing_else(through: str) -> None:
    images = coloured(16)
    found = effects(relay(through), images, images.roll(1, 0), 2)
    needed, idle = ("CLS<-REG", "CLS<-PATCH") if through == "registers" else ("CLS<-PATCH", "CLS<-REG")
    for way in WAYS:
        if way != ZERO:  # of which the norm makes a token that nobody has seen, also to read beside the others
            assert found[idle, way].min() > 0.999, way
        assert found[needed, way].mean() < 0.95, way
        assert found["PATCH<-REG", way].min() > 0.999
    assert not torch.allclose(found[needed, SHUFFLE], found[needed, MEAN], atol=0.01)
    # The mean of all images is between them; another image's colour may be the opposite.
    assert found[needed, SHUFFLE].mean() < found[needed, MEAN].mean()


def test_registers_of_another_image_bring_its_colour() -> None:
    model, images = relay(), coloured(16)
    donors = images.roll(3, 0)
    plain, other = Pass.of(model, images), Pass.of(model, donors)
    usual, places = moments(model, images).usual(), torch.arange(16)
    theirs = model.norm(other.tokens(-1)[:, 0])
    swapped = knocked_out(model, plain, other, usual, Run(SWAP, SHUFFLE, 2, 2), places)
    torch.testing.assert_close(swapped, theirs, atol=0.05, rtol=0.05)
    # Before the registers have taken anything up, there is nothing to exchange.
    early = knocked_out(model, plain, other, usual, Run(SWAP, SHUFFLE, 1, 1), places)
    torch.testing.assert_close(early, model.norm(plain.tokens(-1)[:, 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_images_of_a_batch_do_not_touch_each_other(way: str) -> None:
    model, images = relay(), coloured(5)
    donors, usual = images.flip(0), moments(model, images).usual()

    def cls(at: slice) -> Tensor:
        run = Run("CLS<-REG", way, 1, 2)
        passes = (Pass.of(model, each[at]) for each in (images, donors))
        return knocked_out(model, *passes, usual, run, torch.arange(5)[at])

    together, alone = cls(slice(None)), torch.cat([cls(slice(at, at + 1)) for at in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_usual_tokens_are_the_mean_and_spread_of_what_enters_each_block() -> None:
    model, images = relay(), coloured(7)
    found = (moments(model, images[:3]) + moments(model, images[3:])).usual()
    for layer in range(3):
        tokens = Pass.of(model, images).tokens(layer).double()
        torch.testing.assert_close(found.mean[layer].double(), tokens.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.std[layer].double(), tokens.std(0, correction=0), atol=1e-4, rtol=1e-4)


def test_runs_are_those_that_there_are() -> None:
    runs = plan(6, 0, [0, 5], 2)
    assert {each.edge for each in runs} == {"CLS<-PATCH", "CLS<-CLS"}
    assert {(each.first, each.last) for each in runs} == {(0, 1), (5, 5), (0, 5)}
    assert {each.edge for each in plan(6, 4, [0, 5], 2)} == {*EDGES, SWAP}
    assert len(set(plan(1, 1, [0], 1))) == len(plan(1, 1, [0], 1))
    assert (spread_layers(12, 4), spread_layers(3, 8), spread_layers(3, 0)) == ([0, 4, 7, 11], [0, 1, 2], [0, 1, 2])
    assert spread_layers(5, 1) == [4]


def test_donors_are_others_and_of_other_classes_where_there_are_some() -> None:
    places, labels = torch.tensor([0, 3, 6, 9]), torch.tensor([0, 0, 1, 1])
    own, own_labels = torch.arange(10), torch.tensor([0] * 5 + [1] * 5)
    chosen = choose_donors(places, labels, own, own_labels)
    assert (labels[chosen] != own_labels).all()
    for at in range(10):  # whatever else is in the batch
        assert chosen[at] == choose_donors(places, labels, own[at : at + 1], own_labels[at : at + 1])
    free = choose_donors(places, None, own, own_labels)
    assert (places[free] != own).all()
    same = choose_donors(places, torch.zeros(4).long(), own, torch.zeros(10).long())
    assert (places[same] != own).all()


# ---- masking


def one_patch(place: int) -> Any:
    """As if CLS were what stands in one patch, and a constant."""

    def cls_of(images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).mean((-1, -2))  # (B, 3, N)
        return torch.cat([patches[:, :, place], torch.ones(len(images), 1)], dim=1)

    return cls_of


def test_greyed_patches_have_the_mean_colour_and_others_are_untouched() -> None:
    images, hidden = torch.randn(2, 3, 16, 24), torch.zeros(2, 6, dtype=torch.bool)
    hidden[0, 4] = True
    found = greyed(images, hidden, 8)
    assert found[1].equal(images[1])
    assert found[0, :, 8:, 8:16].abs().max() == 0
    assert int((found[0] != images[0]).sum()) == 3 * 64


def test_the_patch_that_matters_alone_is_found() -> None:
    images = coloured(3)
    cls_of, count = one_patch(5), 16
    first = torch.tensor([5, *(at for at in range(count) if at != 5)]).expand(3, -1)
    early = deletion(cls_of, images, first, 16, PATCH)
    late = deletion(cls_of, images, first.flip(1), 16, PATCH)
    assert early[:, 0].abs().max() == 0
    # At once, or at the very end: all of the change, or none, but half a step.
    torch.testing.assert_close(area(early), early[:, -1] * (1 - 1 / 32))
    torch.testing.assert_close(area(late), late[:, -1] / 32)
    torch.testing.assert_close(area(insertion(late)), 1 - area(late))
    orders = [random_orders(torch.arange(3), 16, draw) for draw in range(40)]
    drawn = torch.stack([deletion(cls_of, images, order, 16, PATCH) for order in orders])
    assert (area(drawn).mean(0) / early[:, -1]).mean() == pytest.approx(0.5, abs=0.1)
    effect = leave_one_out(cls_of, images[0], PATCH, 5)
    assert effect.argmax() == 5
    assert effect[torch.arange(16) != 5].abs().max() < 1e-6


def test_rank_correlation_is_spearmans() -> None:
    one, other = torch.tensor([1.0, 2, 2, 5, 9]), torch.tensor([3.0, 1, 4, 6, 6])
    first, second = np.array([1, 2.5, 2.5, 4, 5]), np.array([2, 1, 3, 4.5, 4.5])
    assert rank_correlation(one, other) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, torch.ones(5)) is None


def test_two_images_know_little_of_a_correlation() -> None:
    score = correlation_score(torch.tensor([-0.8, -0.4]))
    assert score.value == pytest.approx(-0.6)
    assert (score.low, score.high) == (-1, 1)
    assert correlation_score(torch.tensor([0.5])).low == -1
    few = correlation_score(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert (few.low, few.high) == pytest.approx((0.25 - 0.2054, 0.25 + 0.2054), abs=1e-3)


def test_random_orders_depend_on_the_image_alone() -> None:
    together = random_orders(torch.tensor([4, 9]), 16, 1)
    assert together[1:].equal(random_orders(torch.tensor([9]), 16, 1))
    assert together.sort(1).values.equal(torch.arange(16).expand(2, -1))


# ---- the suite


WORDS = [
    "zoom=1", "batch=8", "layers=0", "masked_images=4", "left_out_images=2", "steps=4", "orders=2", "photos=2",
    "images=24", "donors=12",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("classes") / "data", 12, 6)


def measured(ranks: Ranks, folder: Path, data: Path, *words: str) -> Result:
    return run_suite("knockout", Backbone(relay()), surroundings(folder, data, ranks), *WORDS, *words)


def drop(result: Result, edge: str, way: str, layer: int) -> float:
    return next(
        row["drop"]["value"]
        for row in result.details["runs"]
        if (row["edge"], row["way"], row["first"], row["last"]) == (edge, way, layer, layer)
    )


def test_the_suite_tells_whom_cls_listens_to(scene: Path, tmp_path: Path) -> None:
    result = measured(Ranks.alone(), tmp_path, scene)
    assert result.details["top1"] == 100
    assert drop(result, "CLS<-REG", CUT, 2) > 40
    assert drop(result, "CLS<-REG", SHUFFLE, 2) == 100  # donors are of other classes, and CLS believes them
    assert drop(result, "CLS<-PATCH", CUT, 2) == drop(result, "CLS<-PATCH", NOISE, 2) == 0
    assert result.scores["drop_without_registers_last"].value > 40
    swap = {row["layer"]: row for row in result.details["swap"]}
    assert (swap[2]["donor"]["value"], swap[2]["receiver"]["value"]) == (100, 0)
    assert (swap[1]["donor"]["value"], swap[1]["receiver"]["value"]) == (0, 100)
    assert swap[2]["more"]["low"] > 0
    assert (swap[1]["more"]["low"], swap[1]["more"]["high"]) == (0, 0)
    assert result.arrays["cosine"].shape == (2, 4, 4)


def test_without_labels_or_registers_what_is_undefined_is_left_out(scene: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_vit(ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=32, num_registers=0))
    model.init_weights()
    result = run_suite("knockout", Backbone(model), surroundings(tmp_path, scene / "val"), *WORDS)
    assert {row["edge"] for row in result.details["runs"]} == {"CLS<-PATCH", "CLS<-CLS"}
    assert all(row["drop"] is None for row in result.details["runs"])
    assert result.details["swap"] == []
    assert not any("drop" in name or "naming" in name for name in result.scores)


def test_a_single_image_has_nobody_to_exchange_with(scene: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two images"):
        measured(Ranks.alone(), tmp_path, scene, "images=1")
