"""Data sets of files: what is found, skipped, refused, and how a picture is read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fna_lab.data.base import open_picture
from fna_lab.data.folder import FolderData
from fna_lab.data.imagenet import ImageNetData
from fna_lab.data.photos import PhotosData


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Four by four pixels."""
    return torch.from_numpy(np.asarray(picture.resize((4, 4)), dtype=np.float32))


def save(path: Path, colour: tuple[int, int, int] = (10, 200, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "b" / "two.png")
    save(tmp_path / "a" / "one.jpg")
    save(tmp_path / "a" / "ten.webp")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    whole = (tmp_path / "b" / "two.png").read_bytes()
    (tmp_path / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    save(tmp_path / ".cache" / "thumb.png")
    return tmp_path


def test_folder_finds_pictures_in_order_and_names_what_it_skips(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = FolderData(root=str(folder), transform=to_tensor, batch_size=2)
    with caplog.at_level("WARNING"):
        data.setup()
    batches = list(data.test_dataloader())
    names = [name for batch in batches for name in batch["name"]]
    assert names == ["a/one.jpg", "a/ten.webp", "b/two.png"]
    assert data.skipped == ["a/notes.txt", "b/cut.png", "b/empty.jpg"]
    assert "skipped 3 unreadable files: a/notes.txt" in caplog.text
    facts = data.describe()
    assert facts["count"] == 3 and facts["skipped"] == 3
    data.setup()
    assert len(data.skipped) == 3  # a second call does nothing


def test_a_folder_may_be_named_from_another_and_lie_in_a_hidden_one(folder: Path) -> None:
    hidden = folder.parent / ".hidden"
    folder.rename(hidden)
    data = FolderData(root=str(hidden / ".." / ".hidden"), transform=to_tensor)
    data.setup("test")
    assert len(data.test_dataloader().dataset) > 0  # type: ignore[arg-type]


def test_folder_labels_are_the_names_of_its_folders(folder: Path) -> None:
    (folder / "b").rename(folder / "big_dog")
    data = FolderData(root=str(folder), labels=True, transform=to_tensor)
    data.setup()
    assert data.classnames == ["a", "big dog"]
    (batch,) = data.test_dataloader()
    assert batch["label"].tolist() == [0, 0, 1]
    save(folder / "loose.png")
    loose = FolderData(root=str(folder), labels=True, transform=to_tensor)
    with pytest.raises(ValueError, match="loose.png lies in no class folder"):
        loose.setup()


def test_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        FolderData(root=str(tmp_path / "x"), transform=to_tensor).setup()
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(FileNotFoundError, match=r"no picture in it \(1 other files\)"):
        FolderData(root=str(tmp_path), transform=to_tensor).setup()


def test_folder_limit(folder: Path) -> None:
    data = FolderData(root=str(folder), transform=to_tensor, limit=2)
    data.setup()
    assert data.describe()["count"] == 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    suffix = {"CMYK": ".jpg", "F": ".tif"}.get(mode, ".png")
    if mode == "I;16":
        picture = Image.fromarray(np.full((6, 9), 65535, np.uint16))
    else:
        picture = Image.new(mode, (9, 6), 255 if mode in "1LPF" else None)
    picture.save(tmp_path / f"x{suffix}")
    found = open_picture(tmp_path / f"x{suffix}")
    assert found.mode == "RGB" and found.size == (9, 6)
    if mode in ("L", "I;16"):
        assert found.getpixel((3, 3)) == (255, 255, 255)


def test_transparency_becomes_white_and_exif_turns_the_picture(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_photos_ship_with_the_package() -> None:
    data = PhotosData(transform=to_tensor)
    data.setup()
    (batch,) = data.test_dataloader()
    assert list(batch["name"]) == ["astronaut", "chelsea", "coffee", "rocket"]
    assert batch["image"].std(dim=(1, 2, 3)).min() > 1
    with pytest.raises(NotImplementedError, match="data=photos has no labelled"):
        data.bank()


def imagenet(root: Path) -> Path:
    for split, count in (("val", 3), ("train", 4)):
        for wnid in ("n01440764", "n01443537"):
            for i in range(count):
                save(root / split / wnid / f"{wnid}_{i}.JPEG")
    return root


def test_imagenet_folders(tmp_path: Path) -> None:
    data = ImageNetData(root=str(imagenet(tmp_path)), bank_per_class=2, transform=to_tensor)
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert len(data.bank()) == 4  # type: ignore[arg-type]
    few = ImageNetData(root=str(tmp_path), limit=2, transform=to_tensor)
    few.setup()
    assert [few.test_set[i]["label"] for i in range(2)] == [0, 1]  # type: ignore[index]


def test_imagenet_names_of_the_thousand_classes(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / "val" / f"n{i:08d}").mkdir(parents=True)
    save(tmp_path / "val" / "n00000001" / "x.JPEG")
    data = ImageNetData(root=str(tmp_path), transform=to_tensor)
    data.setup()
    assert data.classnames is not None
    assert data.classnames[:2] == ["tench", "goldfish"] and len(data.classnames) == 1000


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({}, ValueError, "data.root is not set"),
        ({"source": "web", "root": "x"}, ValueError, "data.source='web'"),
        ({"root": "nowhere"}, FileNotFoundError, "expected a folder val or validation"),
    ],
)
def test_imagenet_bad_settings(settings: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ImageNetData(transform=to_tensor, **settings).setup()


def test_imagenet_raw_archive_is_explained(tmp_path: Path) -> None:
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="sort them into class folders"):
        ImageNetData(root=str(tmp_path), transform=to_tensor).setup()


def test_imagenet_from_a_local_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def picture(value: int) -> dict:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat, kitty", "dog"])}
    )
    rows = {"image": [picture(i) for i in range(6)], "label": [0, 1, 0, 1, 0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table.select(range(4))}).save_to_disk(
        tmp_path / "saved"
    )
    data = ImageNetData(
        source="hf", dataset=str(tmp_path / "saved"), bank_per_class=1, transform=to_tensor
    )
    data.setup()
    (batch,) = data.test_dataloader()
    assert data.classnames == ["cat", "dog"] and batch["label"].tolist() == [0, 1, 0, 1]
    assert len(data.bank()) == 2  # type: ignore[arg-type]
    bad = ImageNetData(source="hf", dataset=str(tmp_path / "none"), transform=to_tensor)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        bad.setup()
