"""Passes that are interrupted, run again for gradients, or were compiled before the patch."""

from __future__ import annotations

import pytest
import torch
from hosts import build
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.checkpoint import checkpoint

import fna_lab
from fna_lab.backbone.blocks import find_blocks
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.iterative_sinking import IterativeSinkingMask
from fna_lab.mask.type2 import Type2Mask


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("inside", [True, False])
def test_an_interruption_leaves_no_seam(inside):
    host, model, x = build("timm vit")
    plain = host.run(model, x)
    patched = fna_lab.patch(model, "fna", layers="all", num_landmarks=8)
    wanted = host.run(model, x)
    handle = model.blocks[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        host.run(model, x)
    handle.remove()
    if inside:
        assert torch.equal(host.run(model, x), wanted)
    patched.remove()
    assert not modes() and torch.equal(host.run(model, x), plain)


def test_graphs_that_were_compiled_before_know_the_patch():
    _, model, x = build("timm vit")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        with fna_lab.patch(model, "subset", layers="all", num_landmarks=4):
            torch.testing.assert_close(compiled(x), model(x))
            assert not torch.allclose(compiled(x), plain)
        torch.testing.assert_close(compiled(x), plain)


def gradients(model, x, reentrant, attn, mask, settings):
    """Gradients of the inputs, and how many tokens were found, with blocks run again or not."""
    forward = {block: block.forward for block in model.blocks}
    x = x.clone().requires_grad_()
    with fna_lab.patch(model, attn, mask, **settings) as patched:
        hidden = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            if reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=reentrant)
        hidden.square().sum().backward()
        assert all(block.forward == forward[block] for block in model.blocks)
        return x.grad, list(patched.found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("attn", "mask", "settings"),
    [
        ("fna", "none", {"num_landmarks": 8}),
        ("fna_paper", "none", {"num_landmarks": 8}),
        ("subset", "none", {"num_landmarks": 8, "renew": 2}),
        ("nystromformer", "none", {"num_landmarks": [4, 5, 6, 7]}),
        ("fna", Type2Mask(detector=NormRatioDetector(ratio=1.02)), {"mask_layers": "2-"}),
        ("exact", IterativeSinkingMask(), {"mask_layers": "2-"}),
        ("fna", "none", {"num_landmarks": 8, "exclude": ["massive"]}),
    ],
)
def test_blocks_that_run_again_for_gradients_find_what_they_had(attn, mask, settings, reentrant):
    _, model, x = build("timm vit")
    settings = {"layers": "all"} | settings
    if attn == "fna":
        settings = {"num_landmarks": 8} | settings
    wanted, found = gradients(model, x, None, attn, mask, settings)
    again, same = gradients(model, x, reentrant, attn, mask, settings)
    torch.testing.assert_close(again, wanted)
    assert same == found


def test_blocks_of_an_earlier_pass_do_not_take_the_landmarks_of_a_later_one():
    _, model, x = build("timm vit")
    with fna_lab.patch(model, "fna_paper", layers="all", num_landmarks=8):
        outs = []
        for part in (x, x.flip(3)):
            hidden = model._pos_embed(model.patch_embed(part)).requires_grad_()
            for block in model.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False)
            outs.append(hidden.sum())
        with pytest.raises(RuntimeError, match=r"activation checkpointing.*before the next"):
            sum(outs).backward()


def test_a_patch_that_was_removed_is_not_entered_again():
    _, model, _ = build("timm vit")
    patched = fna_lab.patch(model, "fna", layers="all")
    patched.remove()
    with pytest.raises(RuntimeError, match="was removed"), patched:
        pass


def test_the_towers_around_the_blocks_say_what_their_tokens_are():
    _, first, _ = build("timm vit")
    _, second, x = build("timm siglip")
    both = torch.nn.ModuleDict({"first": first, "second": second})
    seen = []

    def look(q, k, v, context):
        seen.append((context.num_prefix_tokens, context.has_cls))

    with fna_lab.patch(both, "exact", layers="all", blocks="second.blocks") as patched:
        patched.observer = look
        second(x)
    assert set(seen) == {(0, False)}
    assert find_blocks(both, "second.blocks")[0] == "second.blocks"
