"""Every way of writing a layer range."""

import pytest

from fna_lab.attn.layers import parse_layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (6, (6,)),
        ([7, 6, 7], (6, 7)),
        (range(6, 12), (6, 7, 8, 9, 10, 11)),
        ("6-8", (6, 7, 8)),
        ("10-", (10, 11)),
        ("0,8-9", (0, 8, 9)),
        ("all", tuple(range(12))),
        (0.5, (6, 7, 8, 9, 10, 11)),
        (0.0, tuple(range(12))),
    ],
)
def test_layers_are_read(layers, expected):
    assert parse_layers(layers, 12, setting="attn.layers") == expected


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (12, "block 12 does not exist"),
        ("6-12", "block 12 does not exist"),
        ([-1], "block -1 does not exist"),
        ("8-6", "runs backwards"),
        ("six", "cannot read 'six'"),
        (1.0, "fraction"),
        ([], "names no block"),
        (True, "expected layers"),
        (None, "expected layers"),
    ],
)
def test_a_wrong_layer_names_the_setting_and_the_value(layers, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_layers(layers, 12, setting="attn.layers")
    assert str(error.value).startswith(f"attn.layers={layers!r}")
