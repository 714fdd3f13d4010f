"""The embedded backbone: small, trained, and good enough that variants can be told apart."""

from __future__ import annotations

import json

import pytest
import torch

import fna_lab
from fna_lab.backbone.fna_tiny import WEIGHTS, FnaTiny
from fna_lab.data.shapes_world import sample_scene
from fna_lab.pretrain import held_out_accuracy


@pytest.fixture(scope="module")
def tiny() -> FnaTiny:
    return FnaTiny()


def test_it_is_small_enough_to_ship_and_large_enough_to_study(tiny: FnaTiny) -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 20e6
    assert tiny.depth >= 8 and tiny.grid[0] * tiny.grid[1] >= 196 and tiny.has_cls


def test_it_names_every_attribute_of_compositions_it_never_saw(tiny: FnaTiny) -> None:
    assert all(sample_scene(i, objects=(1, 1), split="test").split == "test" for i in range(100))
    accuracy = held_out_accuracy(tiny.host, img_size=112, count=150)
    assert set(accuracy) == {"shape", "colour", "size", "texture"}
    assert min(accuracy.values()) > 0.85
    told = json.loads((WEIGHTS / "fna_tiny.json").read_text())["stages"][-1]["accuracy"]
    for name, value in accuracy.items():
        assert value == pytest.approx(told[name], abs=0.05)


def test_what_is_learned_is_lost_without_the_weights() -> None:
    torch.manual_seed(0)
    accuracy = held_out_accuracy(FnaTiny(pretrained=False).host, img_size=112, count=100)
    assert max(accuracy["shape"], accuracy["colour"], accuracy["texture"]) < 0.5


def test_a_bad_approximation_shows_and_a_good_one_does_not(tiny: FnaTiny) -> None:
    scores = {}
    for attn, landmarks in (("exact", None), ("fna", 64), ("linformer_pool", 16)):
        settings = {} if landmarks is None else {"num_landmarks": landmarks}
        with fna_lab.patch(tiny.host, attn, layers="4-7", blocks=tiny.blocks_path, **settings):
            scores[attn] = held_out_accuracy(tiny.host, img_size=112, count=100)["texture"]
    assert scores["exact"] - 0.05 < scores["fna"] and scores["linformer_pool"] < scores["exact"]


def test_other_input_sizes_keep_most_of_it() -> None:
    accuracy = held_out_accuracy(FnaTiny(img_size=160).host, img_size=160, count=100)
    assert min(accuracy["shape"], accuracy["colour"]) > 0.7


@pytest.mark.parametrize("side", [0, 100, "big"])
def test_sizes_that_patches_do_not_tile_are_named(side: object) -> None:
    with pytest.raises(ValueError, match=f"backbone.img_size={side!r}"):
        FnaTiny(img_size=side)  # type: ignore[arg-type]


def test_words_outside_of_its_world_are_named(tiny: FnaTiny) -> None:
    with pytest.raises(ValueError, match="does not know 'dog' of 'a red dog'"):
        tiny.encode_text(["a red circle", "a red dog"])
