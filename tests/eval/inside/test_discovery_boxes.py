"""Readers of boxes: Pascal VOC, COCO, YOLO, and what is said where they are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from objects import write_objects
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.data.images import ORIENTATION, BadImage
from eval.boxes.boxed import Boxed, BoxedImages, as_boxes
from eval.boxes.opening import open_boxes
from eval.suite import Place

VOC = """<annotation><size><width>50</width><height>40</height></size>
<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20.0</ymax></bndbox>
<part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>
<object><name>dog</name><difficult>1</difficult><bndbox><xmax>50</xmax><xmin>11</xmin><ymin>1</ymin><ymax>9</ymax></bndbox></object>
</annotation>"""


def write_voc(root: Path, names: list[str], text: str = VOC) -> Path:
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for name in names:
        (root / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (50, 40)).save(root / "JPEGImages" / f"{name}.jpg")
    return root


def write_coco(root: Path, **more: object) -> Path:
    (root / "train2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [{"id": 7, "file_name": "a.jpg", "height": 40, "width": 50}, {"id": 3, "file_name": "b.jpg"}]
    notes = [
        {"image_id": 7, "bbox": [10.4, 5.6, 20.2, 10], "iscrowd": 0},
        {"image_id": 7, "bbox": [0, 0, 50, 40], "iscrowd": 1},
    ]
    content = {"images": images, "annotations": notes, **more}
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    for name in "ab":
        Image.new("RGB", (50, 40)).save(root / "train2014" / f"{name}.jpg")
    return root


def test_voc_counts_from_one_and_keeps_difficult_objects_but_no_parts(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ["a", "b", "c"])
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("c\na\n")
    images = open_boxes(Place(root))
    assert [entry.file.name for entry in images.entries] == ["c.jpg", "a.jpg"]
    assert images.entries[0].boxes.tolist() == [[0, 1, 30, 20], [10, 0, 50, 9]]
    assert images.entries[0].size == (40, 50)
    assert open_boxes(Place(root), hard=False).entries[0].boxes.tolist() == [[0, 1, 30, 20]]
    with pytest.raises(ConfigError, match=r"split: there is no .*test.txt; the lists there: trainval"):
        open_boxes(Place(root), split="test")


def test_voc_without_lists_beside_its_images_or_in_the_devkit(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "one" / "VOCdevkit" / "VOC2007", ["a", "b"])
    found = open_boxes(Place(tmp_path / "one"))
    assert len(found) == 2 and found.path == str(root)
    shutil.copytree(root, root.with_name("VOC2012"))
    with pytest.raises(ConfigError, match="several years"):
        open_boxes(Place(tmp_path / "one"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in [*root.glob("*/*.xml"), *root.glob("*/*.jpg")]:
        shutil.copy(file, flat)
    assert open_boxes(Place(flat)).digest() == found.digest()


def test_images_with_hard_objects_alone_are_left_out_with_those(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ["a"], VOC.replace("<name>cat</name>", "<name>cat</name><truncated>1</truncated>"))
    write_voc(tmp_path / "more", ["b"])
    for file in ("Annotations/b.xml", "JPEGImages/b.jpg"):
        shutil.move(tmp_path / "more" / file, root / file)
    assert [entry.file.stem for entry in open_boxes(Place(root), hard=False).entries] == ["b"]


def test_coco_leaves_out_crowds_and_keeps_images_without_boxes(tmp_path: Path) -> None:
    images = open_boxes(Place(write_coco(tmp_path)))
    assert [entry.boxes.tolist() for entry in images.entries] == [[[10, 6, 31, 16]], []]
    assert [entry.size for entry in images.entries] == [(40, 50), None]
    assert images.read(1).shape == (3, 40, 50)
    parts = Place.of([f"images={tmp_path}/train2014", f"annotations={tmp_path}/annotations/instances_train2014.json"])
    assert open_boxes(parts).digest() == images.digest()
    (tmp_path / "names.txt").write_text("somewhere/b.jpg\n\n")
    assert len(open_boxes(parts, names=str(tmp_path / "names.txt"))) == 1
    (tmp_path / "names.txt").write_text("b.jpg\nc.jpg\n")
    with pytest.raises(ConfigError, match=r"names: 1 of 2 names are not in .*; the first is c"):
        open_boxes(parts, names=str(tmp_path / "names.txt"))


def test_photos_are_turned_as_their_boxes_are(tmp_path: Path) -> None:
    """Cameras note how they were held; who draws boxes sees the photo turned by that, or does not."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    root = write_coco(tmp_path)
    for name in "ab":  # a is annotated as 50 wide and 40 high; nobody says what b is
        Image.new("RGB", (50, 40)).save(root / "train2014" / f"{name}.jpg", exif=exif)
    images = open_boxes(Place(root))
    assert images.read(0).shape == (3, 40, 50) and images.read(1).shape == (3, 50, 40)


def test_the_folder_of_images_is_found_where_the_first_is_missing(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / "train2014").rename(root / "photos")
    (root / "photos" / "a.jpg").unlink()
    Image.new("RGB", (50, 40)).save(root / "photos" / "b.png")
    file = root / "annotations" / "instances_train2014.json"
    file.write_text(file.read_text().replace("b.jpg", "b.png"))
    images = open_boxes(Place.of([f"images={root}/photos", f"annotations={file}"]))
    assert images.trouble(0) == "missing" and images.trouble(1) is None


def test_images_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    boxes = [as_boxes([[0, 0, side, side]]) for side in (1, 2, 3)]
    files = [Path("/data/one/a.b.jpg"), Path("/data/two/a.b.jpg"), Path("/data/two/c.jpg")]
    images = BoxedImages("/data", "", [Boxed(file, each, None) for file, each in zip(files, boxes, strict=True)])
    names = tmp_path / "names.txt"
    names.write_text("two/a.b\nelsewhere/c.jpg\ntwo/a.b.jpg\n")
    assert [float(entry.boxes.max()) for entry in images.named(names).entries] == [2, 3]
    names.write_text("a.b\n")
    with pytest.raises(ConfigError, match=r"names: a\.b may be any of 2 images: say its folder too"):
        images.named(names)


def test_yolo_says_shares_of_the_image(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (50, 40)).save(tmp_path / "images" / "train" / f"{name}.jpg")
    (tmp_path / "labels" / "train" / "a.txt").write_text("3 0.5 0.5 0.2 1.0\n")
    images = open_boxes(Place(tmp_path))
    np.testing.assert_allclose(images.entries[0].boxes, [[20, 0, 30, 40]])
    assert images.entries[1].boxes.shape == (0, 4)
    # A polygon, and centre and size with a confidence.
    (tmp_path / "labels" / "train" / "b.txt").write_text("0 0.1 0.5 0.5 0.25 0.3 1.0\n\n3 0.5 0.5 0.2 1.0 0.9\n")
    polygon = open_boxes(Place(tmp_path)).entries[1].boxes
    np.testing.assert_allclose(polygon, [[5, 10, 25, 40], [20, 0, 30, 40]], rtol=1e-6)
    (tmp_path / "labels" / "train" / "a.txt").write_text("3 0.5 0.5 0.2\n")
    with pytest.raises(ConfigError, match=r"--data: .*a.txt is damaged: an object has 3 numbers"):
        open_boxes(Place(tmp_path))
    (tmp_path / "labels" / "train" / "a.txt").write_text("3 0.5 half\n")
    with pytest.raises(ConfigError, match=r"--data: .*a.txt is damaged"):
        open_boxes(Place(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (VOC[:90], "is damaged: "),
        (VOC.replace("<xmin>1</xmin>", ""), "is damaged: an object has no xmin"),
        (VOC.replace("<xmin>1<", "<xmin>left<"), "is damaged: could not convert"),
    ],
)
def test_a_damaged_annotation_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        open_boxes(Place(write_voc(tmp_path, ["a"], text)))
    assert str(tmp_path / "Annotations" / "a.xml") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_annotation_and_json_that_is_none(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", ["a"])
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\nz\n")
    with pytest.raises(ConfigError, match=r"z.jpg has no annotation: .*z.xml is missing"):
        open_boxes(Place(root))
    coco = write_coco(tmp_path / "coco")
    file = coco / "annotations" / "instances_train2014.json"
    for content, said in (
        ('{"images": [', "is damaged: "),
        ('{"images": []}', "no JSON of COCO"),
        ("[]", "no JSON of COCO"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}', "no JSON of COCO"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=said) as error:
            open_boxes(Place(coco))
        assert "\n" not in str(error.value)


def test_a_folder_without_boxes_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no images with boxes: Pascal VOC's"):
        open_boxes(Place(tmp_path))
    with pytest.raises(ConfigError, match="annotations= is missing"):
        open_boxes(Place.of([f"images={tmp_path}"]))
    write_coco(tmp_path / "coco")
    one = tmp_path / "coco" / "annotations" / "instances_train2014.json"
    shutil.copy(one, one.with_name("instances_val2014.json"))
    with pytest.raises(ConfigError, match=r"2 lists of boxes .*: say which"):
        open_boxes(Place(tmp_path / "coco"))


def test_a_missing_image_is_bad_and_not_an_end(tmp_path: Path) -> None:
    root = write_objects(tmp_path, 2)
    (root / "JPEGImages" / "000001.jpg").unlink()
    images = open_boxes(Place(root))
    assert images.trouble(0) is None and images.trouble(1) == "missing"
    with pytest.raises(BadImage):
        images.read(1)


def test_real_boxes(shared_data: Path) -> None:
    raccoons = open_boxes(Place(shared_data / "boxes_raccoon"))
    assert len(raccoons) == 200 and raccoons.entries[0].boxes.tolist() == [[57, 62, 376, 294]]
    coco = open_boxes(Place(shared_data / "coco128"))
    assert len(coco) == 128 and sum(not len(entry.boxes) for entry in coco.entries) == 2
