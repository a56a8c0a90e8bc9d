"""The picture of what a backbone sees, the contact sheet of crops, and the k-NN with its labelled images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoreg.data.batch import Crops
from dinoreg.data.labelled import CENTRE, LabelledImages, centre_crop
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from dinoreg.models.weights import save_backbone
from dinoreg.parallel.mesh import Ranks
from dinoreg.train import pictures
from dinoreg.train.knn import KnnMonitor
from dinoreg.train.monitors import MonitorConfig
from dinoreg.train.pictures import crops_picture, look

GREY = PhotometricConfig(mean=[0.5], std=[0.25])


def tiny(**changes: int) -> VisionTransformer:
    torch.manual_seed(0)
    cfg = ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=4, image_size=16, layerscale=0.1)
    for name, value in changes.items():
        setattr(cfg, name, value)
    model = build_vit(cfg)
    model.init_weights()
    return model.eval()


def photo(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("registers", [0, 4])
def test_look_draws_every_column_for_every_photo(tmp_path: Path, registers: int) -> None:
    photo().save(tmp_path / "wide.png")
    out = look(tiny(num_registers=registers), [tmp_path / "wide.png", photo(30, 50)], tmp_path / "deep" / "look.png")
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width > 110 * pictures.CELL * (4 + registers)
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_look_takes_a_weights_file(tmp_path: Path) -> None:
    model = tiny()
    weights = tmp_path / "teacher.safetensors"
    save_backbone(weights, model.state_dict(), model.config)
    as_tensor = torch.from_numpy(np.array(photo())).permute(2, 0, 1)
    from_file = look(weights, [as_tensor], tmp_path / "a.png", size=32).read_bytes()
    assert from_file == look(model, [as_tensor], tmp_path / "b.png", size=32).read_bytes()


def test_look_takes_other_channels(tmp_path: Path) -> None:
    photo().convert("L").save(tmp_path / "grey.png")
    assert look(tiny(in_channels=1), [tmp_path / "grey.png"], tmp_path / "out.png", GREY).exists()


def test_photos_keep_their_aspect_and_fit_the_patches() -> None:
    model = tiny()
    for width, height in ((60, 40), (30, 50), (17, 400)):
        pixels = pictures._prepare(photo(width, height), model, 64)
        assert pixels.dtype == torch.uint8 and pixels.shape[1] % 4 == 0 and pixels.shape[2] % 4 == 0
        assert min(pixels.shape[1:]) == 64
        assert pixels.shape[2] / pixels.shape[1] == pytest.approx(width / height, rel=0.04)


def make_crops(images: int = 3) -> tuple[Crops, torch.Tensor]:
    cfg = PhotometricConfig()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (cfg.mean, cfg.std))
    pixels = torch.randint(0, 256, (images, 2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(images, 2, 16, dtype=torch.bool)
    masks[1, 0, 5] = True  # row 1, column 1 of 4 x 4 patches
    normalised = (pixels / 255 - mean) / std
    return Crops(
        normalised, normalised[..., :8, :8].repeat(1, 2, 1, 1, 1), masks, masks.flatten().nonzero()[:, 0]
    ), pixels


def test_crops_are_shown_as_they_are_with_masks_in_grey(tmp_path: Path) -> None:
    crops, pixels = make_crops()
    restored = pictures._restore(crops.global_crops, PhotometricConfig())
    assert torch.equal(restored.long(), pixels)
    shown = pictures._grey_out(restored, crops.masks).long()
    changed = (shown != pixels).any(2)
    inside = torch.zeros_like(changed)
    inside[1, 0, 4:8, 4:8] = True
    assert torch.equal(changed & ~inside, torch.zeros_like(changed)) and changed[inside].float().mean() > 0.9
    assert (shown[1, 0, :, 4:8, 4:8] - 128).abs().max() <= 20
    with Image.open(crops_picture(crops, PhotometricConfig(), tmp_path / "crops.png")) as drawn:
        assert drawn.width > drawn.height > 300


def test_crops_picture_without_local_crops(tmp_path: Path) -> None:
    crops, _ = make_crops()
    crops.local_crops = crops.local_crops[:, :0]
    assert crops_picture(crops, PhotometricConfig(), tmp_path / "crops.png").exists()


# ------------------------------------------------------------------------------------------------ labelled images


def colour_folder(root: Path, classes: dict[str, str], count: int, noise: int = 30) -> Path:
    """Images of one noisy colour a class."""
    rng = np.random.default_rng(list(root.name.encode()))
    for name, colour in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = np.array(Image.new("RGB", (24, 20), colour)) + rng.integers(0, noise, (20, 24, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def colour_shard(path: Path, folder: Path, labels: dict[str, int | None]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, label in labels.items():
            for file in sorted((folder / name).iterdir()):
                contents = {"png": file.read_bytes()} | ({} if label is None else {"cls": str(label).encode()})
                for extension, content in contents.items():
                    member = tarfile.TarInfo(f"{name}_{file.stem}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


COLOURS = {"blue": "#2040c0", "green": "#20c040", "red": "#c02040"}


def test_labelled_folder_and_shard_agree(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "images", COLOURS, 3)
    shard = colour_shard(tmp_path / "s-000.tar", folder, {"blue": 0, "green": 1, "red": 2})
    from_folder = LabelledImages(folder, 8)
    assert (
        from_folder.classes == ["blue", "green", "red"] and from_folder.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )
    for from_shard in (LabelledImages(shard, 8), LabelledImages(str(tmp_path / "s-{000..000}.tar"), 8)):
        assert len(from_shard) == 9
        for (a, label), (b, other) in zip(from_folder, from_shard, strict=True):
            assert torch.equal(a, b) and label == other


def test_labelled_images_are_cropped_at_the_centre() -> None:
    pixels = torch.zeros(3, 64, 96, dtype=torch.uint8)
    side = round(64 * CENTRE)
    pixels[:, 4 : 4 + side, 20 : 20 + side] = 200
    assert centre_crop(pixels, 28).unique().tolist() == [200]


def test_labelled_errors_say_what_is_missing(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "images", COLOURS, 1)
    with pytest.raises(ValueError, match=r"blue_0.png in .*bare.tar has no label"):
        LabelledImages(colour_shard(tmp_path / "bare.tar", folder, {"blue": None}), 8)
    with pytest.raises(ValueError, match="has the class red, which the training images do not have"):
        LabelledImages(folder, 8, classes=["blue", "green"])
    with pytest.raises(ValueError, match="lies in no class folder"):
        LabelledImages(folder / "red", 8)
    for missing in ("nowhere", "nowhere-{000..001}.tar"):
        with pytest.raises(ValueError, match="nowhere"):
            LabelledImages(tmp_path / missing, 8)


def monitor(ranks: Ranks, **paths: str) -> KnnMonitor:
    return KnnMonitor(MonitorConfig(knn_every=1, knn_k=3, **paths), tiny().config, PhotometricConfig(), ranks)


def test_knn_tells_colours_apart_and_leaves_bad_images_out(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "train", COLOURS, 10)
    other = colour_folder(tmp_path / "test", COLOURS, 4)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    (other / "red" / "broken.png").write_bytes(b"no image")
    assert monitor(Ranks.alone(), knn_train=str(folder), knn_test=str(other))(tiny()) == 1.0
    held_out = monitor(Ranks.alone(), knn_train=str(folder))
    assert len(held_out.test) == 6 and len(held_out.train) == 25  # type: ignore[arg-type]
    assert held_out(tiny()) == 1.0


def test_knn_with_wrong_labels_is_wrong(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "train", COLOURS, 6)
    train = colour_shard(tmp_path / "train.tar", folder, {"blue": 0, "green": 1, "red": 2})
    test = colour_shard(tmp_path / "test.tar", folder, {"blue": 0, "green": 2, "red": 1})
    assert monitor(Ranks.alone(), knn_train=str(train), knn_test=str(test))(tiny()) == pytest.approx(1 / 3)


def _two_ranks(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, 2, torch.device("cpu"))
    found = monitor(ranks, knn_train=f"{folder}/train", knn_test=f"{folder}/test")(tiny())
    Path(folder, f"{rank}.txt").write_text(str(found))
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    hard = {"a": "#505050", "b": "#585858", "c": "#545454"}
    colour_folder(tmp_path / "train", hard, 5, noise=60)
    colour_folder(tmp_path / "test", hard, 3, noise=60)  # 9 images: an uneven share
    expected = monitor(Ranks.alone(), knn_train=str(tmp_path / "train"), knn_test=str(tmp_path / "test"))(tiny())
    assert 0 < expected < 1
    torch.multiprocessing.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert float((tmp_path / f"{rank}.txt").read_text()) == pytest.approx(expected)
