"""The making of the embedded backbone: exact truth, and a small training end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fna_lab import pretrain
from fna_lab.backbone.tiny_clip import WordTokenizer, build_clip
from fna_lab.data.shapes_world import SHAPES, render, sample_scene
from fna_lab.pretrain import ANY, GROUPS, Lessons, single_claims


def test_batches_are_the_same_on_every_machine_and_never_of_the_test_split() -> None:
    one, two = (Lessons(img_size=24, batch_size=6, seed=3) for _ in range(2))
    two.batch(0)
    for key, value in one.batch(5).items():
        assert torch.equal(value, two.batch(5)[key])
    resumed = iter(Lessons(img_size=24, batch_size=6, seed=3, start=5))
    assert torch.equal(next(resumed)["image"], one.batch(5)["image"])


def test_truth_says_which_caption_fits_which_picture() -> None:
    #            two things: (shape, colour, size, texture)
    things = np.full((2, 5, 4), -2)
    things[0, 0], things[0, 1] = (1, 2, 0, 3), (4, 2, 1, 0)
    things[1, 0] = (1, 5, 0, 3)
    claims = np.full((5, 2, 4), ANY)
    claims[0, 0] = (1, ANY, ANY, ANY)  # both
    claims[1, 0] = (ANY, 2, 1, ANY)  # the second thing of the first picture
    claims[2, 0] = (1, 2, 1, ANY)  # parts of two things: neither
    claims[3] = [(1, ANY, ANY, 3), (4, ANY, ANY, ANY)]  # needs both things
    grounds = np.array([0, 1])
    told = np.array([ANY, ANY, ANY, ANY, 1])  # the last claims a background alone
    true = pretrain._truth(things, grounds, claims, told)
    assert true.tolist() == [[True, True, False, True, False], [True, False, False, False, True]]


def test_every_batch_names_each_attribute_once() -> None:
    batch = Lessons(img_size=24, batch_size=8, seed=0).batch(0)
    count = sum(len(group) for group in GROUPS)
    assert batch["text"].shape[0] == batch["true"].shape[1] == 8 + count
    assert sum(len(claims) for claims in single_claims()) == count
    start = 8
    for group in GROUPS:  # every picture shows at least one shape, one colour, ...
        assert batch["true"][:, start : start + len(group)].any(1).all()
        start += len(group)
    assert batch["true"].diagonal().all()  # a picture's own caption fits it


def test_patch_shapes_are_those_of_the_segmentation() -> None:
    lessons = Lessons(img_size=64, batch_size=4, seed=0, single=1.0)
    batch = lessons.batch(0)
    own = batch["true"][:, 4 : 4 + len(SHAPES)].long().argmax(1)
    for shapes, shape in zip(batch["shapes"], own, strict=True):
        assert set(shapes.tolist()) <= {0, 1 + int(shape)}
    assert (batch["shapes"] > 0).any()
    scene = sample_scene(0, objects=(1, 1))
    assert render(scene, 64)[1][4::8, 4::8].shape == (8, 8)


def test_training_writes_weights_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--stages 24:3,32:2 --batch-size 8 --count 12 --workers 0 --cpu".split()
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["pretrain", *small, *folders])
    pretrain.main()
    facts = json.loads((tmp_path / "out" / "fna_tiny.json").read_text())
    assert [stage["img_size"] for stage in facts["stages"]] == [24, 32]
    assert all(math.isfinite(stage["loss"]) for stage in facts["stages"])
    assert facts["arguments"]["seed"] == 0 and "synthetic" in facts["data"]
    state = safetensors.torch.load_file(tmp_path / "out" / "fna_tiny.safetensors")
    model = build_clip(img_size=32, **facts["model"])
    model.load_state_dict({k: v.float() for k, v in state.items()})
    fresh = build_clip(img_size=32, **facts["model"])
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert model.encode_text(WordTokenizer()(["a red circle"])).shape == (1, 128)


def test_training_goes_on_from_weights_without_cls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--stages 24:1 --batch-size 8 --count 4 --workers 0 --cpu --rate 0".split()
    more = ["--pool", "patches", "--uniform", "0.9", "--optimizer", "adamw"]
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(sys, "argv", ["pretrain", *small, "--out", str(first)])
    monkeypatch.chdir(tmp_path)
    pretrain.main()
    start = ["--start", str(first / "fna_tiny.safetensors"), "--out", str(second)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *small, *more, *start])
    pretrain.main()
    one, two = (safetensors.torch.load_file(d / "fna_tiny.safetensors") for d in (first, second))
    # At rate 0 the second run ends with the weights that it began with.
    torch.testing.assert_close(one["visual.conv1.weight"], two["visual.conv1.weight"])
    facts = json.loads((second / "fna_tiny.json").read_text())
    model = build_clip(img_size=24, **facts["model"])
    seen: list[int] = []
    block = model.visual.transformer.resblocks[0]
    block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    model.encode_image(torch.zeros(1, 3, 24, 24))
    assert seen == [9]  # 3 x 3 patches, no CLS
