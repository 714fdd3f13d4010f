"""The synthetic world: deterministic, of any size, true to its labels, disjoint by split."""

from __future__ import annotations

import numpy as np
import pytest

from fna_lab.backbone.tiny_clip import WordTokenizer
from fna_lab.data.base import TEMPLATES
from fna_lab.data.shapes import LABELS, ShapesData, label_of
from fna_lab.data.shapes_world import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SPLITS,
    render,
    sample_scene,
    split_of,
)

SCENES = [sample_scene(i, objects=(1, 5), split="test") for i in range(60)]
SINGLE = [sample_scene(i, objects=(1, 1), split="test") for i in range(60)]


def test_same_seed_same_picture_whatever_came_before() -> None:
    render(sample_scene(9), 32)
    first, second = (render(sample_scene(3, split="val"), 64) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], render(sample_scene(4, split="val"), 64)[0])


def test_no_composition_occurs_in_two_splits() -> None:
    seen = {
        split: {sample_scene(i, objects=(1, 2), split=split).composition for i in range(1500)}
        for split in SPLITS
    }
    for split, compositions in seen.items():
        assert all(split_of(composition) == split for composition in compositions)
    assert (
        not seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"]
    )


def test_the_order_of_objects_does_not_move_a_composition_between_splits() -> None:
    for scene in SCENES:
        turned = tuple(sorted(thing.attributes for thing in reversed(scene.things)))
        assert split_of(turned) == scene.split == "test"


@pytest.mark.parametrize("size", [16, 56, 112, 250])
def test_any_resolution_shows_the_same_scene(size: int) -> None:
    for scene in SINGLE[:10]:
        picture, segmentation = render(scene, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert segmentation.shape == (size, size)
        share = (segmentation > 0).mean()
        reference = (render(scene, 448)[1] > 0).mean()
        assert abs(share - reference) < 0.02


def test_segmentation_holds_the_shapes_that_are_there_at_the_places_that_are_said() -> None:
    for scene in SCENES:
        _, segmentation = render(scene, 160)
        kinds = set(np.unique(segmentation).tolist()) - {0}
        assert kinds <= {1 + SHAPES.index(thing.shape) for thing in scene.things}
        top = scene.things[-1]
        if top.shape != "ring":  # a ring has a hole where its centre is
            row, column = int(top.y * 160), int(top.x * 160)
            assert segmentation[row, column] == 1 + SHAPES.index(top.shape)


def test_objects_have_the_colour_that_is_said() -> None:
    for scene in SINGLE:
        picture, segmentation = render(scene, 160)
        mean = picture[segmentation > 0].mean(0)
        mean = mean / np.linalg.norm(mean)
        likeness = {
            name: mean @ (np.array(rgb) / np.linalg.norm(rgb)) for name, rgb in COLOURS.items()
        }
        assert max(likeness, key=likeness.get) == scene.things[0].colour  # type: ignore[arg-type]


def test_captions_are_several_true_and_in_the_vocabulary() -> None:
    tokenize = WordTokenizer()
    for scene in SCENES + SINGLE:
        assert len(scene.captions) >= 4
        tokenize(scene.captions)
        things = {f"{thing.colour} {thing.shape}" for thing in scene.things}
        brief = scene.captions[-1] if len(scene.things) > 1 else scene.captions[2]
        assert any(thing in brief for thing in things)
        counted = [c for c in scene.captions if "objects on a" in c]
        assert all(c.startswith(NUMBERS[len(scene.things)]) for c in counted)


def test_questions_have_the_answers_that_the_scene_gives() -> None:
    for scene in SCENES:
        answers = dict(scene.questions)
        assert answers["how many objects are there?"] == NUMBERS[len(scene.things)]
        largest = max(scene.things, key=lambda thing: thing.radius)
        assert answers["what shape is the largest object?"] == largest.shape
        shapes = [thing.shape for thing in scene.things]
        for question, answer in scene.questions:
            if question.startswith("is there a "):
                assert (question[11:-1] in shapes) == (answer == "yes")
            if " left or right of the " in question:
                a, b = question[len("is the ") : -1].split(" left or right of the ")
                x = {thing.shape: thing.x for thing in scene.things}
                assert (x[a] < x[b]) == (answer == "left")


@pytest.mark.parametrize("label", LABELS)
def test_labels_name_the_largest_object(label: str) -> None:
    for scene in SCENES:
        words = LABELS[label][label_of(scene, label)].split()
        shape, colour, size, texture = scene.main.attributes
        wanted = {
            "shape": [shape],
            "colour": [colour, "object"],
            "size": [size, "object"],
            "texture": [texture, "object"],
            "shape_colour": [colour, shape],
            "all": [size, texture, colour, shape],
        }[label]
        assert words == wanted
    WordTokenizer()([t.format(name) for t in TEMPLATES for name in LABELS[label]])


def test_data_set_draws_the_split_it_says() -> None:
    data = ShapesData(transform=np.asarray, count=20, split="val", objects=(1, 3), label="shape")  # type: ignore[arg-type]
    data.setup()
    assert data.test_set is not None
    assert {data.test_set.scene(i).split for i in range(20)} == {"val"}  # type: ignore[attr-defined]
    assert {data.bank().scene(i).split for i in range(20)} == {"train"}
    with pytest.raises(NotImplementedError, match="data.label=all"):
        ShapesData(transform=np.asarray).bank()  # type: ignore[arg-type]
    sample = data.test_set[3]
    assert sample["segmentation"].shape == (112, 112) and sample["index"] == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "dev"}, "data.split='dev'"),
        ({"objects": (0, 2)}, r"data.objects=\[0, 2\]"),
        ({"objects": (2, 6)}, r"data.objects=\[2, 6\]"),
        ({"count": 0}, "data.count=0"),
        ({"label": "smell"}, "data.label='smell'"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"limit": -1}, "data.limit=-1"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShapesData(transform=np.asarray, **settings)  # type: ignore[arg-type]
