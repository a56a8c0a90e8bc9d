"""Figures, losses, heads, windows and transforms of the suites on whole images, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinoreg.parallel.mesh import Ranks
from eval.dense.frame import Frame, Maps
from eval.dense.heads import DepthHead, MaskHead, SyncNorm
from eval.dense.losses import gradient_loss, log_errors, mask_loss, scale_invariant_loss
from eval.dense.metrics import IGNORED, areas, class_table, depth_scores, depth_values, mask_scores
from eval.dense.pictures import RAMP, colour, paint_depths, paint_labels
from eval.dense.slide import classify, slide, starts
from eval.dense.training import Schedule
from eval.dense.transforms import (
    DepthAugmentation,
    MaskAugmentation,
    distort,
    resize_image,
    resize_target,
    rotate,
    size_for,
    tint,
)

CLASSES = 5


@pytest.fixture
def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and truths (6, 9, 11); class 4 is nowhere, some pixels are ignored."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(4, (6, 9, 11), generator=generator)
    truth = torch.randint(IGNORED, 4, (6, 9, 11), generator=generator).to(torch.int16)
    return predicted, truth


def test_scores_of_masks_are_those_of_counting_pixel_by_pixel(masks: tuple[torch.Tensor, torch.Tensor]) -> None:
    predicted, truth = masks
    matrix = np.zeros((CLASSES, CLASSES))  # truth by prediction
    for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t != IGNORED:
            matrix[t, p] += 1
    right, true, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    seen = true + said > 0
    per_image = torch.stack([areas(p, t, CLASSES) for p, t in zip(predicted, truth, strict=True)])
    scores = mask_scores(per_image)
    assert scores["miou"].value == pytest.approx(100 * np.mean(right[seen] / (true + said - right)[seen]))
    assert scores["pixel_accuracy"].value == pytest.approx(100 * right.sum() / matrix.sum())
    assert scores["mean_accuracy"].value == pytest.approx(100 * np.mean(right[true > 0] / true[true > 0]))
    assert all(score.low <= score.value <= score.high for score in scores.values())
    table = class_table(per_image, list("abcde"))
    assert [row["class"] for row in table] == list("abcde")
    assert table[4] == {"class": "e", "pixels": 0.0, "iou": None, "accuracy": None}
    assert table[1]["iou"] == pytest.approx(100 * right[1] / (true + said - right)[1], abs=1e-3)


def test_scores_of_masks_are_those_of_torchmetrics(masks: tuple[torch.Tensor, torch.Tensor]) -> None:
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except Exception as error:  # it imports torchvision, whose import can fail in many ways
        pytest.skip(f"torchmetrics cannot be imported: {error}")
    predicted, truth = masks[0], masks[1].long()
    scores = mask_scores(torch.stack([areas(p, t, 4) for p, t in zip(predicted, truth, strict=True)]))
    index = MulticlassJaccardIndex(4, ignore_index=IGNORED)(predicted, truth)
    accuracy = MulticlassAccuracy(4, ignore_index=IGNORED, average="micro")(predicted, truth)
    mean = MulticlassAccuracy(4, ignore_index=IGNORED, average="macro")(predicted, truth)
    for name, value in (("miou", index), ("pixel_accuracy", accuracy), ("mean_accuracy", mean)):
        assert scores[name].value == pytest.approx(100 * float(value), rel=1e-5)


def test_intervals_come_from_images_drawn_anew() -> None:
    """Of images that are all alike, every drawing is the same; of very different ones, none is."""
    image = torch.tensor([[8, 3], [10, 5], [11, 4]])
    score = mask_scores(image.expand(20, 3, 2))["miou"]
    assert score.low == pytest.approx(score.value) == pytest.approx(score.high)
    other = torch.tensor([[0, 0], [10, 5], [5, 10]])
    score = mask_scores(torch.stack([image, other] * 10))["miou"]
    assert score.low < score.value - 3 < score.value + 3 < score.high


def test_depth_values_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 + 5 * torch.rand(40, generator=generator)
    predicted = truth * (0.5 + 1.2 * torch.rand(40, generator=generator))
    pairs = list(zip(predicted.double().tolist(), truth.double().tolist(), strict=True))
    expected = [
        np.sqrt(np.mean([(p - t) ** 2 for p, t in pairs])),
        np.mean([abs(p - t) / t for p, t in pairs]),
        np.mean([abs(np.log10(p) - np.log10(t)) for p, t in pairs]),
        *(np.mean([max(p / t, t / p) < 1.25**power for p, t in pairs]) for power in (1, 2, 3)),
    ]
    found = depth_values(predicted, truth)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    scores = depth_scores(torch.stack([found, found]), "_lin1")
    assert scores["rmse_lin1"].value == pytest.approx(expected[0], rel=1e-6)
    assert (scores["rmse_lin1"].unit, scores["rmse_lin1"].better) == ("m", "lower")
    assert scores["delta1_lin1"].better == "higher"


def test_the_loss_of_masks_divides_by_ignored_pixels_too() -> None:
    logits, truth = torch.randn(2, 3, 4, 5), torch.randint(IGNORED, 3, (2, 4, 5))
    total = 0.0
    for image, labels in zip(logits.double(), truth, strict=True):
        for row in range(4):
            for column in range(5):
                if labels[row, column] != IGNORED:
                    total -= float(image[:, row, column].log_softmax(0)[labels[row, column]])
    assert float(mask_loss([logits], [truth])) == pytest.approx(total / truth.numel(), rel=1e-5)
    # Images one by one give the same as together.
    apart = mask_loss([logits[:1], logits[1:]], [truth[:1], truth[1:]])
    assert float(apart) == pytest.approx(total / truth.numel(), rel=1e-5)


def depths() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    truth = [(4 * torch.rand(shape, generator=generator) - 1).clamp(min=0) for shape in ((15, 17), (13, 16))]
    predicted = [0.1 + 3 * torch.rand(t.shape, generator=generator) for t in truth]
    return predicted, truth


def test_the_scale_invariant_loss_is_that_of_the_formula() -> None:
    predicted, truth = depths()
    g = np.array(
        [
            np.log(float(p) + 1e-3) - np.log(float(t) + 1e-3)
            for ps, ts in zip(predicted, truth, strict=True)
            for p, t in zip(ps.flatten(), ts.flatten(), strict=True)
            if t > 0
        ]
    )
    errors = log_errors(predicted, truth)
    expected = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    assert float(scale_invariant_loss(errors, truth)) == pytest.approx(expected, rel=1e-5)
    warm = scale_invariant_loss(errors, truth, warming_up=True)
    assert float(warm) == pytest.approx(np.sqrt(0.15) * abs(g.mean()), rel=1e-4)


def test_the_gradient_loss_is_that_of_a_loop() -> None:
    predicted, truth = depths()
    expected = 0.0
    for every in (1, 2, 4, 6):
        total, known = 0.0, 0
        for p, t in zip(predicted, truth, strict=True):
            p, t = p[::every, ::every].double().numpy(), t[::every, ::every].double().numpy()
            d = np.log(p + 1e-3) - np.log(t + 1e-3)
            known += int((t > 0).sum())
            for row in range(t.shape[0]):
                for column in range(t.shape[1]):
                    for r, c in ((row + 2, column), (row, column + 2)):
                        if r < t.shape[0] and c < t.shape[1] and t[row, column] > 0 and t[r, c] > 0:
                            total += abs(d[row, column] - d[r, c])
        expected += total / known
    assert float(gradient_loss(log_errors(predicted, truth), truth)) == pytest.approx(expected, rel=1e-4)


def test_losses_of_depths_have_gradients_where_nothing_is_known_or_all_is_right() -> None:
    for truth in (torch.zeros(8, 8), torch.ones(8, 8)):
        predicted = torch.ones(8, 8, requires_grad=True)
        errors = log_errors([predicted], [truth])
        (scale_invariant_loss(errors, [truth]) + gradient_loss(errors, [truth])).backward()
        assert predicted.grad is not None
        assert predicted.grad.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(28, 42), (30, 41), (512, 512), (7, 100)])
def test_predictions_lie_where_the_image_lay_among_its_patches(height: int, width: int) -> None:
    frame = Frame(height, width, 14)
    image = torch.rand(1, 2, height, width)
    padded = frame.pad(image)
    assert [padded.shape[2] / 14, padded.shape[3] / 14] == list(frame.grid)
    torch.testing.assert_close(frame.cut(padded), image)
    maps = torch.randn(2, 3, *frame.grid)
    (top, left), size = frame.corner, tuple(padded.shape[2:])
    whole = F.interpolate(maps, size=size, mode="bilinear")[:, :, top : top + height, left : left + width]
    torch.testing.assert_close(frame.cut(maps), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frame.cut(maps, 3), whole[:, :, ::3, ::3], atol=1e-5, rtol=1e-5)


def test_the_norm_is_torchs_batch_norm() -> None:
    ours, theirs = SyncNorm(6, Ranks.alone()), nn.BatchNorm1d(6)
    for _ in range(3):
        tokens = 3 + 2 * torch.randn(40, 6)
        found = torch.cat([part.flatten(0, 1) for part in ours([tokens[:30].view(5, 6, 6), tokens[30:].view(2, 5, 6)])])
        torch.testing.assert_close(found, theirs(tokens))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.var, theirs.running_var)
    tokens = torch.randn(9, 6)
    torch.testing.assert_close(ours.eval()([tokens])[0], theirs.eval()(tokens))


def test_depths_are_those_of_enlarging_the_features_first() -> None:
    frame = Frame(24, 32, 8)
    maps = Maps(torch.randn(2, 3, 1 + 12, 5), frame)
    head = DepthHead(5, 2, 16, 0.1, 10, 4, seed=0)
    features = []
    for layer in (1, 2):
        patches, cls = maps.tokens[:, layer, 1:], maps.tokens[:, layer, :1].expand(2, 12, 5)
        features.append(torch.cat([patches, cls], dim=2).transpose(1, 2).unflatten(2, frame.grid))
    wide = torch.cat([F.interpolate(each, scale_factor=4, mode="bilinear") for each in features], dim=1)
    logits = F.conv2d(wide, head.linear.weight[:, :, None, None], head.linear.bias)
    weights = logits.relu() + 0.1
    expected = torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), torch.linspace(0.1, 10, 16))
    torch.testing.assert_close(head([maps])[0][:, 0], expected, atol=1e-5, rtol=1e-5)


def test_heads_take_the_last_blocks_they_want() -> None:
    maps = Maps(torch.randn(1, 4, 1 + 6, 5), Frame(16, 24, 8))
    head = MaskHead(5, 1, 3, Ranks.alone(), 0).eval()
    before = head([maps])[0]
    maps.tokens[:, :3] = 0
    maps.tokens[:, :, 0] = 0  # nor does the class token count
    torch.testing.assert_close(head([maps])[0], before)


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [(512, 512, 341, [0]), (683, 512, 341, [0, 171]), (1200, 512, 341, [0, 341, 682, 688]), (300, 512, 341, [0])],
)
def test_windows_begin_as_published(length: int, crop: int, stride: int, expected: list[int]) -> None:
    assert starts(length, crop, stride) == expected


@pytest.mark.parametrize(("height", "width"), [(20, 33), (11, 40), (9, 9), (25, 13)])
def test_windows_cover_every_pixel_and_are_averaged(height: int, width: int) -> None:
    image = torch.rand(3, height, width)
    torch.testing.assert_close(slide(image, 12, 7, lambda windows: 2 * windows), 2 * image)
    # Windows that say their own number: each pixel has the mean of those that see it.
    calls: list[int] = []

    def number(windows: torch.Tensor) -> torch.Tensor:
        first = sum(calls)
        calls.append(len(windows))
        return torch.arange(first, first + len(windows)).float().view(-1, 1, 1, 1).expand(-1, 1, *windows.shape[2:])

    found = slide(image, 12, 7, number)[0]
    corners = [(top, left) for top in starts(height, 12, 7) for left in starts(width, 12, 7)]
    for row in range(height):
        for column in range(width):
            seen = [n for n, (t, l) in enumerate(corners) if 0 <= row - t < 12 and 0 <= column - l < 12]
            assert float(found[row, column]) == pytest.approx(np.mean(seen))


def test_classes_in_parts_are_those_of_all_at_once() -> None:
    scores = torch.randn(70, 5, 6)
    expected = F.interpolate(scores[None], size=(13, 11), mode="bilinear")[0].argmax(0)
    torch.testing.assert_close(classify(scores, (13, 11)), expected)


def test_the_rate_rises_and_falls_as_published() -> None:
    poly = Schedule(40000, 1e-3, 0, 1500, 1e-6, "linear", 0, 1)
    assert poly.rate_at(0) == pytest.approx(1e-9)
    assert poly.rate_at(750) == pytest.approx(1e-3 * (1 - 750 / 40000) * (1 - 0.5 * (1 - 1e-6)))
    assert poly.rate_at(20000) == pytest.approx(5e-4)
    cosine = Schedule(38400, 1e-4, 0, 12800, 1e-3, "cosine", 35, 1)
    assert cosine.rate_at(0) == pytest.approx(1e-7)
    assert cosine.rate_at(19200) == pytest.approx(5e-5)


def test_images_and_targets_are_resized_as_the_published_pipelines_do() -> None:
    assert size_for(480, 640, 224) == (224, 299)
    target = torch.arange(63).view(7, 9)
    for size in ((5, 6), (14, 20), (7, 9)):
        expected = F.interpolate(target[None, None].float(), size=size, mode="nearest")[0, 0]
        torch.testing.assert_close(resize_target(target, size).float(), expected)
    flat = torch.full((3, 10, 12), 77, dtype=torch.uint8)
    assert (resize_image(flat, (5, 31)) == 77).all()


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    target = torch.zeros(64, 64)
    target[:, 44:] = 1  # of 100 columns where a crop of 32 may begin, few give a class its quarter
    change = MaskAugmentation(64, (1.0, 1.0), 32, 0.75)
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = [
        float(change(pixels, target, np.random.default_rng(seed))[1].mean()) for seed in range(40)
    ]  # fmt: skip
    assert sum(0.25 < share < 0.75 for share in shares) >= 39
    loose = MaskAugmentation(64, (1.0, 1.0), 32, 1.1)
    shares = [float(loose(pixels, target, np.random.default_rng(seed))[1].mean()) for seed in range(40)]
    assert sum(0.25 < share < 0.75 for share in shares) < 36


def test_augmentations_move_images_and_targets_together() -> None:
    """The target is told by the red channel, before and after."""
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.integers(1, 4, (3, 4))).float().repeat_interleave(20, 0).repeat_interleave(20, 1)
    pixels = torch.stack([target * 60, torch.zeros_like(target), torch.zeros_like(target)]).to(torch.uint8)
    for seed in range(10):
        moved, labels = DepthAugmentation((40, 50), edges=False)(pixels, target, np.random.default_rng(seed))
        known = labels > 0
        assert labels.shape == (40, 50)
        assert moved.shape == (3, 40, 50)
        values = [float(moved[0].float()[labels == label].median()) for label in (1, 2, 3)]
        assert values[0] < values[1] < values[2]
        assert known.float().mean() > 0.9
        moved, labels = MaskAugmentation(60, (0.8, 1.2), 40, 0.9)(pixels, target, np.random.default_rng(seed))
        assert labels.shape == (40, 40)
        areas_seen = [moved.float().sum(0)[labels == label] for label in (1, 2, 3) if (labels == label).any()]
        assert max(float(values.std(correction=0)) for values in areas_seen) < 40


def test_colours_change_but_stay_colours() -> None:
    pixels = torch.randint(256, (3, 12, 13), dtype=torch.uint8)
    for change in (distort, tint):
        results = [change(pixels, np.random.default_rng(seed)) for seed in range(8)]
        assert all(result.dtype == torch.uint8 and result.shape == pixels.shape for result in results)
        assert len({result.numpy().tobytes() for result in results}) >= 7


def test_turning_by_nothing_changes_nothing() -> None:
    pixels, target = torch.randint(256, (3, 9, 8), dtype=torch.uint8), torch.rand(9, 8)
    turned, depth = rotate(pixels, target, 0.0)
    torch.testing.assert_close(turned, pixels)
    torch.testing.assert_close(depth, target)


def test_every_class_has_a_colour_of_its_own() -> None:
    colours = [colour(label) for label in range(-1, 150)]
    assert colours[0] == (0, 0, 0)
    assert len(set(colours)) == 151
    painted = paint_labels(torch.tensor([[IGNORED, 3], [0, 149]]))
    assert [tuple(pixel) for row in painted.tolist() for pixel in row] == [
        colours[0],
        colours[4],
        colours[1],
        colours[150],
    ]


def test_depths_have_one_scale_of_colours_from_near_to_far() -> None:
    painted = paint_depths(torch.tensor([[0.0, 1.0, 2.5, 4.0, 9.0]]), 1.0, 4.0)[0]
    assert painted[0].tolist() == [0, 0, 0]  # unknown
    assert painted[1].tolist() == RAMP[0].tolist()
    assert painted[3].tolist() == painted[4].tolist() == RAMP[-1].tolist()
    assert painted[1].sum() > painted[2].sum() > painted[3].sum()
