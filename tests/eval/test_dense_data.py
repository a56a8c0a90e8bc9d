"""Pairs of images with masks or depths: what is found, and what is wrong with them, in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_scenes import SIZE, write_depths, write_masks
from evaluating import surroundings
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, DataError
from eval.dense.depths import open_depths, read_depth
from eval.dense.masks import Labels, open_masks
from eval.dense.metrics import IGNORED
from eval.dense.pairs import FilePairs
from eval.suite import Place


def masks_of(
    root: Path, classes: int = 0, ignore: tuple[int, ...] = (255,), shift: str = "auto"
) -> tuple[FilePairs, FilePairs, Labels]:
    return open_masks(Place.of([str(root)]), surroundings(root, root), classes, ignore, shift)


def relabel(mask: Path, value: int) -> Path:
    pixels = np.array(Image.open(mask))
    pixels[:3] = value
    Image.fromarray(pixels).save(mask)
    return mask


def test_classes_are_found_in_the_masks(tmp_path: Path) -> None:
    train, test, labels = masks_of(write_masks(tmp_path))
    assert (len(train), len(test)) == (12, 4)
    assert (labels.classes, labels.shift, labels.names[3]) == (4, False, "class 3")
    image, mask = train.read(0)
    assert (image.shape, mask.shape, mask.dtype) == ((3, *SIZE), SIZE, torch.int16)
    assert sorted(mask.unique().tolist()) == [0, 1, 2, 3]


def test_the_official_layout_has_the_label_shift(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "ADEChallengeData2016", names=("training", "validation"), add=1)
    relabel(root / "annotations" / "validation" / "000.png", 0)
    _, test, labels = masks_of(tmp_path)
    assert (labels.classes, labels.shift) == (150, True)
    mask = test.target(0)
    assert mask[0, 0] == IGNORED
    assert set(mask.unique().tolist()) == {IGNORED, 0, 1, 2, 3}
    _, test, labels = masks_of(tmp_path, classes=5, shift="no")
    assert test.target(0)[0, 0] == 0


def test_names_and_void_are_read_from_a_file(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    (root / "classes.txt").write_text("sky\nroad\ncar\nvoid\n")
    _, test, labels = masks_of(root)
    assert (labels.classes, labels.ignore, labels.names) == (3, (3, 255), ("sky", "road", "car"))
    assert set(test.target(0).unique().tolist()) == {IGNORED, 0, 1, 2}


def test_palettes_and_16_bits_are_indices_too(tmp_path: Path) -> None:
    labels = Labels(300, (255,), False, ())
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(indices, "P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "palette.png")
    assert labels.read(tmp_path / "palette.png").tolist() == indices.tolist()
    Image.fromarray(indices.astype(np.uint16) + 280).save(tmp_path / "wide.png")
    assert labels.read(tmp_path / "wide.png")[0, 0] == 280


def test_what_is_wrong_with_masks_is_told(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "good")
    with pytest.raises(
        DataError, match=r"val/000.png holds the label 3, .* 3 classes \(labels 0 to 2\) .*ignore=\[255\]"
    ):
        masks_of(root, classes=3)[1].target(0)
    file = root / "annotations" / "train" / "000.png"
    Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).save(file)
    with pytest.raises(DataError, match=r"000.png is 30 x 20, but its image 000.png is 60 x 45 pixels"):
        masks_of(root)[0].read(0)
    Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(file)
    with pytest.raises(DataError, match=r"holds colours \(RGB\), not indices"):
        masks_of(root, classes=4)[0].read(0)
    file.write_bytes((root / "annotations" / "train" / "001.png").read_bytes()[:60])
    with pytest.raises(BadImage):
        masks_of(root)[0].read(0)
    file.unlink()
    with pytest.raises(ConfigError, match=r"1 of 12 images in .*images/train have no mask .* first is 000.png"):
        masks_of(root)
    shutil.rmtree(root / "images" / "val")
    with pytest.raises(ConfigError, match=r"holds no images/validation"):
        masks_of(root)
    empty = write_masks(tmp_path / "empty", test=0)
    with pytest.raises(ConfigError, match=r"images/val holds no images"):
        masks_of(empty)


def test_both_parts_can_be_given_by_themselves(tmp_path: Path) -> None:
    write_masks(tmp_path / "a")
    for part in ("train", "val"):
        for kind in ("images", "annotations"):
            (tmp_path / "parts" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / kind / part).rename(tmp_path / "parts" / part / kind)
    words = [f"train={tmp_path}/parts/train", f"test={tmp_path}/parts/val"]
    train, test, _ = open_masks(Place.of(words), surroundings(tmp_path, tmp_path), 0, (255,), "auto")
    assert (len(train), len(test)) == (12, 4)


@pytest.mark.parametrize(
    ("kind", "scale", "unit"), [("png", 1000, "millimetres"), ("npy", 1, "metres"), ("npy", 1000, "millimetres")]
)
def test_the_unit_of_depths_is_found_and_said(tmp_path: Path, kind: str, scale: float, unit: str) -> None:
    data = open_depths(Place.of([str(write_depths(tmp_path, scale=scale, kind=kind))]))
    assert (data.scales, data.official) == ((scale, scale), False)
    assert data.found.startswith(f"{unit} (the middle value is")
    image, depth = data.train.read(0)
    assert (image.shape[1:], depth.shape, depth.dtype) == (SIZE, SIZE, torch.float32)
    assert sorted(depth.unique().tolist()) == [0, 1, 2, 3, 4]


def test_millimetres_taken_for_metres_are_refused(tmp_path: Path) -> None:
    root = write_depths(tmp_path)
    with pytest.raises(ConfigError, match="these are millimetres taken for metres; scale=1000 is right"):
        open_depths(Place.of([str(root)]), scale=1)
    with pytest.raises(ConfigError, match="scale says how many of the values make a metre, 1 where they are metres"):
        open_depths(Place.of([str(write_depths(tmp_path / "m", scale=1, kind="npy"))]), scale=1000)
    assert open_depths(Place.of([str(root)]), scale=2000).scales == (2000, 2000)


def test_depths_that_are_no_number_are_unknown(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1.5, np.nan, np.inf], [-1, 0, 2]]))
    assert read_depth(tmp_path / "a.npy", 1).tolist() == [[1.5, 0, 0], [0, 0, 2]]
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png is no depth map: uint8 of shape \(4, 4\)"):
        read_depth(tmp_path / "b.png", 1)
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(BadImage):
        read_depth(tmp_path / "c.npy", 1)


def test_what_is_wrong_with_folders_of_depths_is_told(tmp_path: Path) -> None:
    root = write_depths(tmp_path)
    (root / "val" / "001.depth.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 4 images in .*val have no depth map; the first is 001.color.png"):
        open_depths(Place.of([str(root)]))
    shutil.copy(root / "train" / "000.color.png", root / "train" / "000_rgb.png")
    with pytest.raises(ConfigError, match=r"000_rgb.png and 000.color.png would be the same scene"):
        open_depths(Place.of([str(root)]))
    (root / "train" / "000_rgb.png").unlink()
    for file in (root / "val").glob("*.depth.png"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"val holds no depth maps with the names of its 4 images"):
        open_depths(Place.of([str(root)]))
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"holds no folders train and val"):
        open_depths(Place.of([str(root)]))


def test_folders_of_rgb_and_depth_are_pairs_by_name(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_depths(tmp_path / "flat" / part, train=2, test=1)
        for kind, word in (("rgb", "color"), ("depth", "depth")):
            (tmp_path / part / "room" / kind).mkdir(parents=True)
            for file in (tmp_path / "flat" / part / "train").glob(f"*.{word}.png"):
                file.rename(tmp_path / part / "room" / kind / f"{file.name[:3]}.png")
    data = open_depths(Place.of([f"train={tmp_path}/train", f"test={tmp_path}/test"]))
    assert (len(data.train), len(data.test)) == (2, 2)


def test_the_lists_of_extracted_nyu_are_read(tmp_path: Path) -> None:
    write_depths(tmp_path)
    for name, part, count in (("nyu_train.txt", "train", 12), ("nyu_test.txt", "val", 4)):
        lines = [f"/{part}/{n:03d}.color.png {part}/{n:03d}.depth.png 518.8579" for n in range(count)]
        (tmp_path / name).write_text("\n".join([*lines, "some/frame.png None 518.8579"]) + "\n")
    data = open_depths(Place.of([str(tmp_path)]))
    assert (len(data.train), len(data.test), data.official, data.scales[0]) == (12, 4, True, 1000)
    (tmp_path / "val" / "002.depth.png").unlink()
    with pytest.raises(ConfigError, match=re.escape("1 files that it names are not there, the first is")):
        open_depths(Place.of([str(tmp_path)]))


def test_the_official_file_of_nyu_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    io = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    images, depths = rng.integers(256, size=(6, 8, 10, 3)).astype(np.uint8), rng.uniform(1, 5, (6, 8, 10))
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)  # columns first, as MATLAB writes
        file["depths"] = depths.transpose(0, 2, 1)
    with pytest.raises(ConfigError, match=r"splits.mat is needed beside"):
        open_depths(Place.of([str(tmp_path)]))
    io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3], [4], [6]]), "testNdxs": np.array([[2], [5]])})
    data = open_depths(Place.of([str(tmp_path)]))
    assert (len(data.train), len(data.test), data.official) == (4, 2, True)
    image, depth = data.test.read(1)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), images[4])
    np.testing.assert_allclose(depth.numpy(), depths[4], rtol=1e-6)
