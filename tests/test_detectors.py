"""Every detector against the slow formula by hand, and what all of them promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hosts import HOSTS, build

from fna_lab import ops
from fna_lab.backbone.blocks import find_blocks
from fna_lab.mask.detector.base import Detector, Evidence
from fna_lab.mask.detector.cls_proxy import ClsProxyDetector
from fna_lab.mask.detector.incoming import IncomingDetector
from fna_lab.mask.detector.ncut import NcutDetector
from fna_lab.mask.detector.norm_fixed import NormFixedDetector
from fna_lab.mask.detector.norm_gap import NormGapDetector
from fna_lab.mask.detector.norm_ratio import NormRatioDetector
from fna_lab.mask.detector.projection import ProjectionDetector
from fna_lab.mask.detector.register_neurons import RegisterNeuronsDetector
from fna_lab.mask.detector.singular_defect import SingularDefectDetector
from fna_lab.mask.detector.sink_rate import SinkRateDetector

B, H, N, D, C = 3, 4, 64, 8, 16
PLANTED = {0: [9, 40], 1: [20], 2: []}  # constructed: tokens that stand out, picture by picture

DETECTORS: dict[str, Detector] = {
    "norm_gap": NormGapDetector(min_gap=1.0),
    "norm_ratio": NormRatioDetector(),
    "norm_fixed": NormFixedDetector(norm=40.0),
    "cls_proxy": ClsProxyDetector(),
    "incoming raw": IncomingDetector(factor=4.0),
    "incoming std": IncomingDetector(rule="std", factor=5.0),
    "incoming std log": IncomingDetector(rule="std", factor=3.0, log=True),
    "sink_rate": SinkRateDetector(epsilon=0.1, share=0.5),
    "ncut": NcutDetector(threshold=5.0, massive=None),
    "ncut sampled": NcutDetector(threshold=5.0, massive=None, samples=40),
    "projection": ProjectionDetector(),
    "projection given": ProjectionDetector(direction=[1.0] + 15 * [0.0]),
    "register_neurons": RegisterNeuronsDetector(neurons=[[0, 3], [1, 2]]),
    "singular_defect": SingularDefectDetector(stds=3.0),
}
every_detector = pytest.mark.parametrize("name", DETECTORS)


def evidence(prefix: int = 1, cls: bool = True, dtype=torch.float32, **more: Any) -> Evidence:
    """Random tokens; those of PLANTED are long, draw attention, and fire two neurons."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, q, k, neurons = draw(B, N, C), draw(B, H, N, D), draw(B, H, N, D), draw(B, N, 2)
    for picture, tokens in PLANTED.items():
        for t in tokens:
            x[picture, t, 0] = 60.0
            k[picture, :, t] = 3 * q[picture].mean(1) + 2.0
            neurons[picture, t] = torch.tensor([-12.0, 9.0])
    q = q + 0.6
    k[:, :, 0] = q[:, :, 0]  # CLS sees itself
    first = torch.zeros(C, dtype=torch.float64)
    first[0] = 1
    given = {"x": x, "q": q, "k": k, "neurons": neurons, "prepared": first}
    given = {name: value.to(dtype) for name, value in given.items()}
    return Evidence(
        num_prefix_tokens=prefix, has_cls=cls, grid=None, scale=D**-0.5, **(given | more)
    )


def narrow(seen: Evidence, picture: int) -> Evidence:
    """One picture of the evidence."""
    one = slice(picture, picture + 1)
    parts = {name: getattr(seen, name)[one] for name in ("x", "q", "k", "neurons")}
    found = None if seen.found is None else seen.found[one]
    return Evidence(
        num_prefix_tokens=seen.num_prefix_tokens,
        has_cls=seen.has_cls,
        scale=seen.scale,
        bias=seen.bias,
        found=found,
        stage=seen.stage,
        prepared=seen.prepared,
        **parts,
    )


@every_detector
def test_what_was_planted_is_found_and_nothing_else(name):
    found = DETECTORS[name](evidence())
    wanted = [[b, t] for b, tokens in PLANTED.items() for t in tokens]
    assert found.nonzero().tolist() == wanted
    assert found.dtype == torch.bool and found.shape == (B, N)


@every_detector
def test_scores_order_the_found_tokens_before_the_others(name):
    seen = evidence()
    found, scores = DETECTORS[name](seen), DETECTORS[name].scores(seen)
    assert scores.shape == (B, N)
    for b in range(B):
        if found[b].any():
            assert scores[b][found[b]].min() > scores[b][~found[b]].max()
    assert torch.equal(scores == -torch.inf, ~seen.candidates())


@every_detector
@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_are_never_found(name, prefix):
    seen = evidence(prefix=prefix)
    seen.x[:, :prefix, 0] = 500.0
    assert seen.neurons is not None and seen.k is not None and seen.q is not None
    seen.neurons[:, :prefix] = 90.0
    seen.k[:, :, 1:prefix] = 9.0
    assert not DETECTORS[name](seen)[:, :prefix].any()
    assert (DETECTORS[name].scores(seen)[:, :prefix] == -torch.inf).all()


@every_detector
@pytest.mark.parametrize("stage", ["mask", "sink"])
def test_found_tokens_are_never_found_again(name, stage):
    before = DETECTORS[name](evidence())
    seen = evidence(found=before, stage=stage)
    assert not (DETECTORS[name](seen) & before).any()
    assert (DETECTORS[name].scores(seen)[before] == -torch.inf).all()


@every_detector
@pytest.mark.parametrize("again", [False, True])
def test_a_picture_does_not_depend_on_its_batch_mates(name, again):
    detector = DETECTORS[name]
    seen = evidence()
    if again:
        seen.found = torch.zeros(B, N, dtype=torch.bool)
        seen.found[0, 9] = True
    found, scores = detector(seen), detector.scores(seen)
    for b in range(B):
        assert torch.equal(detector(narrow(seen, b))[0], found[b])
        torch.testing.assert_close(detector.scores(narrow(seen, b))[0], scores[b])


@every_detector
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_type(name, dtype):
    seen = evidence(dtype=dtype)
    assert torch.equal(DETECTORS[name](seen), DETECTORS[name](evidence()))
    assert DETECTORS[name].scores(seen).dtype != torch.bfloat16


def slow_attention(seen: Evidence, b: int) -> np.ndarray:
    """`[h n n]` one entry at a time."""
    assert seen.q is not None and seen.k is not None
    out = np.zeros((H, N, N))
    gone = [] if seen.found is None else seen.found[b].nonzero()[:, 0].tolist()
    for h in range(H):
        for i in range(N):
            row = [seen.scale * float(seen.q[b, h, i] @ seen.k[b, h, j]) for j in range(N)]
            if seen.bias is not None:
                row = [value + float(seen.bias[0, h, i, j]) for j, value in enumerate(row)]
            weights = [math.exp(value) for value in row]
            if seen.stage == "mask":
                weights = [0.0 if j in gone else value for j, value in enumerate(weights)]
            weights = [value / sum(weights) for value in weights]
            out[h, i] = [0.0 if j in gone else value for j, value in enumerate(weights)]
    return out


def slow_share(attention: np.ndarray, prefix: int) -> list[float]:
    mean = attention.mean(0)
    share = [0.0] * N
    for i in range(N):
        row = [0.0 if j < prefix else mean[i, j] for j in range(N)]
        for j in range(N):
            share[j] += 0.0 if i == j else row[j] / sum(row) / N
    return share


@pytest.mark.parametrize("stage", [None, "mask", "sink"])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("chunk", [7, 256])
def test_incoming_attention_is_the_slow_formula(stage, prefix, chunk):
    seen = evidence(prefix=prefix, cls=prefix > 0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    seen.bias = torch.randn(1, H, N, N, generator=generator, dtype=torch.float64)
    if stage is not None:
        seen.found = DETECTORS["norm_ratio"](seen)
        seen.stage = stage
    slow = slow_attention(seen, 0)
    assert seen.q is not None and seen.k is not None
    settings = dict(scale=seen.scale, bias=seen.bias, found=seen.found, stage=seen.stage)
    by_head = ops.incoming_by_head(seen.q, seen.k, chunk=chunk, **settings)
    np.testing.assert_allclose(by_head[0], slow.mean(1), rtol=1e-9)
    share = ops.incoming_share(seen.q, seen.k, prefix=prefix, chunk=chunk, **settings)
    np.testing.assert_allclose(share[0], slow_share(slow, prefix), rtol=1e-9)
    np.testing.assert_allclose(seen.pattern()[0], slow, rtol=1e-9)
    np.testing.assert_allclose(seen.cls_row()[0], slow[:, :1], rtol=1e-9)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(("rule", "log"), [("raw", False), ("std", False), ("std", True)])
def test_the_rules_of_incoming_attention(rule, log, taken):
    seen = evidence(dtype=torch.float64)
    if taken:
        seen.found = torch.zeros(B, N, dtype=torch.bool)
        seen.found[:, 9] = True
    share = seen.incoming_share()
    detector = IncomingDetector(rule=rule, log=log, factor=3.3)
    found, scores = detector(seen), detector.scores(seen)
    for b in range(B):
        left = [t for t in range(1, N) if not (taken and t == 9)]
        values = {t: share[b, t].item() for t in left}
        if rule == "raw":
            heights = {t: value * (N - 1 - taken) for t, value in values.items()}
            wanted = {t for t in left if values[t] > 3.3 / (N - 1 - taken)}
        else:
            values = {t: math.log(v) if log else v for t, v in values.items()}
            numbers = np.array(list(values.values()))
            mean, std = numbers.mean(), numbers.std(ddof=1)
            heights = {t: (value - mean) / std for t, value in values.items()}
            wanted = {t for t in left if values[t] > mean + 3.3 * std}
        assert set(found[b].nonzero()[:, 0].tolist()) == wanted
        for t in left:
            assert scores[b, t].item() == pytest.approx(heights[t])
    assert found.any()


def test_published_thresholds_are_the_defaults():
    assert IncomingDetector().factor == 9.0 and IncomingDetector(rule="std").factor == 7.0
    share = torch.full((1, 101), 0.01)
    share[0, 5], share[0, 6] = 0.0899, 0.0901
    assert ops.incoming_sinks(share)[0].nonzero().tolist() == [[0, 6]]
    share = torch.arange(100.0)[None] / 1e4
    share[0, 50] = 1.0
    assert ops.incoming_sinks(share, rule="std")[0].nonzero().tolist() == [[0, 50]]
    even = torch.full((1, 100), 0.01)
    assert not ops.incoming_sinks(even, rule="std")[0].any()


def test_sink_rate_counts_heads():
    seen = evidence(dtype=torch.float64)
    slow = slow_attention(seen, 0).mean(1)  # [h n]
    for share in (0.0, 0.4, 0.9):
        found = SinkRateDetector(epsilon=0.05, share=share)(seen)[0]
        for t in range(1, N):
            assert found[t].item() == ((slow[:, t] > 0.05).sum() / H > share)
    assert SinkRateDetector(epsilon=0.05)(seen).any()
    scores = SinkRateDetector(epsilon=0.05).scores(seen)[0]
    heads = [(slow[:, t] > 0.05).sum() for t in range(1, N)]
    order = scores[1:].argsort(descending=True).tolist()
    assert [heads[t] for t in order] == sorted(heads, reverse=True)


def test_projection_is_the_first_component():
    seen = evidence(dtype=torch.float64)
    found, scores = ProjectionDetector(ratio=2.0)(seen), ProjectionDetector().scores(seen)
    for b in range(B):
        x = seen.x[b, 1:].numpy()
        x = x - x.mean(0)
        axis = np.linalg.svd(x, full_matrices=False)[2][0]
        along = x @ axis
        along = along * np.sign(along[np.abs(along).argmax()])
        lengths = sorted(np.linalg.norm(x, axis=1))
        along = along / lengths[(N - 2) // 2]
        np.testing.assert_allclose(scores[b, 1:], along, rtol=1e-6, atol=1e-9)
        assert found[b].nonzero()[:, 0].tolist() == (np.nonzero(along > 2.0)[0] + 1).tolist()


def test_projection_of_more_channels_than_tokens():
    wide = evidence(dtype=torch.float64)
    wide.x = torch.cat([wide.x, torch.zeros(B, N, 100, dtype=torch.float64)], dim=2)
    expected = ProjectionDetector().scores(evidence(dtype=torch.float64))
    torch.testing.assert_close(ProjectionDetector().scores(wide), expected)


def test_a_given_direction_keeps_its_sign(tmp_path):
    against = ProjectionDetector(direction=[-1.0] + 15 * [0.0])
    assert not against(evidence()).any()
    np.save(tmp_path / "axis.npy", np.eye(16)[0])
    found = ProjectionDetector(direction=str(tmp_path / "axis.npy"))(evidence())
    assert torch.equal(found, DETECTORS["projection given"](evidence()))
    with pytest.raises(ValueError, match="direction has 3 numbers.*16 channels"):
        ProjectionDetector(direction=[1.0, 0.0, 0.0])(evidence())


def test_ncut_is_an_eigenvector_of_the_normalised_affinity():
    seen = evidence(dtype=torch.float64)
    detector = NcutDetector(component=2, threshold=2.0, massive=None)
    found, scores = detector(seen), detector.scores(seen)
    for b in range(B):
        x = seen.x[b, 1:].numpy()
        low, high = np.quantile(x, [0.022750131948179, 0.977249868051821], axis=0)
        width = np.linalg.norm(high - low) / 4
        affinity = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * width**2))
        root = np.sqrt(affinity.sum(1))
        u = np.linalg.eigh(affinity / np.outer(root, root))[1][:, -3]
        u = u * np.sign(u[np.abs(u).argmax()]) * math.sqrt(N - 1)
        np.testing.assert_allclose(scores[b, 1:], u, rtol=1e-6, atol=1e-6)
        assert found[b].nonzero()[:, 0].tolist() == (np.nonzero(u > 2.0)[0] + 1).tolist()


def test_ncut_on_a_reference_of_the_batch_is_the_published_form(tmp_path):
    """The cut of all tokens at once, with a threshold on entries of a vector of length 1."""
    seen = evidence(dtype=torch.float64)
    pool = seen.x[:, 1:].reshape(1, -1, C).float()
    u = ops.normalized_cut(pool, 2).vectors[0, :, 1]
    np.savez(tmp_path / "tokens.npz", tokens=pool[0].numpy())
    np.save(tmp_path / "tokens.npy", pool[0].numpy())
    for name in ("tokens.npz", "tokens.npy"):
        more = {"massive": None, "samples": None, "reference": str(tmp_path / name)}
        detector = NcutDetector(threshold=3.0, **more)
        scores = detector.scores(seen)[:, 1:]
        np.testing.assert_allclose(scores, u.view(B, -1) * len(u) ** 0.5, rtol=1e-4, atol=1e-4)
        wanted = (u > 3.0 / len(u) ** 0.5).view(B, -1)
        assert torch.equal(detector(seen)[:, 1:], wanted) and wanted.sum(1).tolist() == [2, 1, 0]
        for b in range(B):
            assert torch.equal(detector(narrow(seen, b))[0, 1:], wanted[b])
    with pytest.raises(ValueError, match="reference has 16 channels.*have 5"):
        detector(evidence(x=torch.rand(B, N, 5)))
    np.save(tmp_path / "flat.npy", np.zeros(7))
    for name, said in (("flat.npy", r"got shape \(7,\)"), ("no.npy", "No such file")):
        with pytest.raises(ValueError, match=said):
            NcutDetector(reference=str(tmp_path / name))


def test_ncut_leaves_massive_tokens_out_and_can_ask_for_a_group_apart():
    seen = evidence()
    found, scores = NcutDetector(threshold=5.0)(seen), NcutDetector().scores(seen)
    for b, tokens in PLANTED.items():
        assert (scores[b, tokens] == 0).all() and not found[b, tokens].any()
    assert NcutDetector()(seen).any(1).all()  # rare content, where nothing was planted
    assert not NcutDetector(value=0.9)(seen).any()
    apart = NcutDetector(value=0.9, massive=None, threshold=5.0)
    assert torch.equal(apart(seen), DETECTORS["ncut"](seen))


def test_the_proxy_without_cls_is_the_raw_rule():
    seen = evidence(prefix=0, cls=False)
    for ratio in (0.3, 1.0):
        wanted = IncomingDetector(factor=9 * ratio)(seen)
        assert torch.equal(ClsProxyDetector(ratio=ratio)(seen), wanted)
        assert wanted.any()
    one = ClsProxyDetector(ratio=0.3, top=1)(seen)
    assert one.sum(1).tolist() == [1, 1, int(ClsProxyDetector()(seen)[2].any())]
    assert torch.equal(one[0].nonzero()[0], ClsProxyDetector().scores(seen)[0].argmax()[None])


def test_the_proxy_can_ask_for_more_than_uniform_shares():
    seen = evidence(dtype=torch.float64)
    row = slow_attention(seen, 0)[:, 0].mean(0)
    for least in (0.0, 0.5, 4.0):
        found = ClsProxyDetector(ratio=0.02, least=least)(seen)[0]
        for t in range(1, N):
            assert found[t].item() == (row[t] > max(0.02 * row[0], least / N))
    assert (
        ClsProxyDetector(ratio=0.02)(seen).sum()
        > ClsProxyDetector(ratio=0.02, least=4.0)(seen).sum()
    )


def test_the_class_of_the_proxy_follows_its_ratio():
    assert ClsProxyDetector().finds == "massive"
    assert ClsProxyDetector(ratio=1.0).finds == "artifact"
    assert ClsProxyDetector(ratio=1.0, finds="massive").finds == "massive"


def test_register_neurons_fire_in_means_of_the_picture():
    seen = evidence(dtype=torch.float64)
    assert seen.neurons is not None
    scores = DETECTORS["register_neurons"].scores(seen)
    for b in range(B):
        strength = [float(seen.neurons[b, t].abs().sum()) / 2 for t in range(N)]
        mean = sum(strength[1:]) / (N - 1)
        np.testing.assert_allclose(scores[b, 1:], np.array(strength[1:]) / mean)


def test_the_linear_map_of_a_linear_block_is_exact():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ops.linear_map(x, x @ weight.T + 3.0), weight)
    second = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    left = np.linalg.svd((second @ weight).numpy())[0][:, 0]
    found = ops.defect_direction([weight, second]).numpy()
    assert abs(left @ found) == pytest.approx(1)


NOT_ALONE = {"timm beit": "broadcast shape", "timm beitv2": "broadcast shape"}


@pytest.mark.parametrize("name", HOSTS)
def test_singular_defects_of_every_host(name):
    _, model, _ = build(name)
    _, blocks = find_blocks(model)
    detector = SingularDefectDetector(samples=2000)
    if name in NOT_ALONE:
        with pytest.raises(NotImplementedError, match=f"block 0 .* does not: .*{NOT_ALONE[name]}"):
            detector.prepare(blocks, 2)
        return
    found = detector.prepare(blocks, 2)
    # Independently: numpy's least squares and SVD over other inputs, one sequence at a time.
    channels, product = len(found), None
    generator = torch.Generator().manual_seed(99)
    for block in blocks[:2]:
        x = torch.randn(4000, 1, channels, generator=generator)
        more = {}
        if "CLIPEncoderLayer" in type(block).__name__:
            more = {"attention_mask": None}
        with torch.no_grad():
            out = block(x, **more)
        y = (out[0] if isinstance(out, tuple) else out)[:, 0].numpy()
        ones = np.concatenate([x[:, 0].numpy(), np.ones((4000, 1))], axis=1)
        one = np.linalg.lstsq(ones, y, rcond=None)[0][:channels].T
        product = one if product is None else one @ product
    assert product is not None
    gain = np.linalg.norm(found.numpy() @ product) / np.linalg.norm(product, 2)
    assert gain > 0.97


def test_a_planted_defect_is_found_by_weights_alone():
    _, model, _ = build("timm vit")
    _, blocks = find_blocks(model)
    axis = torch.randn(48, generator=torch.Generator().manual_seed(3))
    axis = axis / axis.norm()
    # Constructed: the values of block 1 push every token that lies along `axis` further along it.
    width = blocks[1].attn.qkv.weight.shape[0] // 3
    blocks[1].attn.qkv.weight[2 * width :] = 30 * torch.eye(48)
    blocks[1].attn.proj.weight.copy_(torch.outer(axis, axis))
    direction = SingularDefectDetector().prepare(blocks, 3)
    assert abs(direction.float() @ axis) > 0.95
    assert torch.equal(direction, SingularDefectDetector().prepare(blocks, 3))


def test_hooks_of_patches_are_not_run_by_prepare():
    _, model, _ = build("timm vit")
    _, blocks = find_blocks(model)
    blocks[0].register_forward_pre_hook(lambda *a: pytest.fail("ran"))
    SingularDefectDetector(samples=100).prepare(blocks, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NormFixedDetector(norm=0), r"mask.detector.norm=0: expected a number > 0"),
        (lambda: NormFixedDetector(norm=True), "mask.detector.norm=True"),
        (lambda: IncomingDetector(rule="max"), "rule='max': expected one of raw, std"),
        (lambda: IncomingDetector(factor=-1), "mask.detector.factor=-1: expected"),
        (lambda: IncomingDetector(log=True), "mask.detector.log=True: expected false"),
        (lambda: SinkRateDetector(epsilon=1.0), "mask.detector.epsilon=1.0"),
        (lambda: SinkRateDetector(share=1.0), "mask.detector.share=1.0"),
        (lambda: ProjectionDetector(direction="no.npy"), "direction='no.npy': expected a list"),
        (lambda: ProjectionDetector(direction=[0.0, 0.0]), "not all zero"),
        (lambda: RegisterNeuronsDetector(neurons=[[1]]), r"neurons=\[\[1\]\]: expected \[\[block"),
        (lambda: RegisterNeuronsDetector().prepare([], 3), "neurons=null: expected"),
        (
            lambda: RegisterNeuronsDetector(neurons=[[3, 1]]).prepare([], 3),
            r"neurons=\[\[3, 1\]\]: expected neurons of blocks before block 3",
        ),
        (lambda: SingularDefectDetector(samples=1), "mask.detector.samples=1"),
        (lambda: SingularDefectDetector().prepare([], 0), "mask.detect=0: singular_defect reads"),
        (
            lambda: SingularDefectDetector(samples=9).prepare([torch.nn.Linear(9, 9)], 1),
            "samples=9: expected more than the 9 channels",
        ),
        (lambda: NcutDetector(component=0), "mask.detector.component=0"),
        (lambda: NcutDetector(threshold=-1), "mask.detector.threshold=-1"),
        (lambda: NcutDetector(massive=0), "mask.detector.massive=0"),
        (lambda: NcutDetector(value=1.5), "mask.detector.value=1.5: expected a number from 0 to"),
        (lambda: NcutDetector(samples=1), "samples=1: expected an integer above component=1"),
        (lambda: NcutDetector(component=9)(evidence(x=torch.ones(B, 9, C))), "has 9 tokens"),
        (lambda: ClsProxyDetector(least=-1), "mask.detector.least=-1"),
        (lambda: ClsProxyDetector(finds="odd"), "mask.detector.finds='odd'"),
        (lambda: DETECTORS["incoming raw"](Evidence(torch.zeros(1, 9, 4), 1, True)), "q and k"),
        (lambda: DETECTORS["singular_defect"](Evidence(torch.ones(1, 9, 4), 1, True)), "prepare"),
        (lambda: DETECTORS["register_neurons"](Evidence(torch.ones(1, 9, 4), 1, True)), "neurons"),
        (lambda: ops.incoming_sinks(torch.ones(1, 9), log=True), "log only with rule='std'"),
        (lambda: ops.incoming_by_head(*2 * [torch.ones(1, 1, 3, 2)], chunk=0), "chunk to be"),
        (lambda: ops.sink_rate(torch.ones(1, 9)), "incoming to have shape"),
        (lambda: ops.norm_fixed(torch.ones(1, 9, 3), norm=0), "norm to be > 0"),
        (lambda: ops.defect_direction([]), "at least one map"),
        (lambda: ops.linear_map(torch.ones(2, 3), torch.ones(2, 3)), "s > c"),
        (lambda: ops.alignment(torch.ones(1, 9, 3), torch.ones(4)), "direction to have 3 channel"),
    ],
)
def test_wrong_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_class_of_every_token():
    massive = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    artifact = torch.tensor([[1, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1]]).bool()
    names = [
        [ops.TOKEN_CLASSES[i] for i in row]
        for row in ops.token_classes(massive, artifact, prefix=2).tolist()
    ]
    assert names == [
        ["cls", "register", "massive", "massive", "artifact", "normal"],
        ["cls", "register", "artifact", "normal", "normal", "massive"],
    ]
    assert ops.token_classes(massive, prefix=0, has_cls=False)[1].tolist() == [4, 4, 4, 4, 4, 2]
    assert ops.token_classes(massive, prefix=1, has_cls=False)[0, 0] == 1
    with pytest.raises(ValueError, match="prefix to be from 1 to 6, got 0"):
        ops.token_classes(massive, prefix=0)
    with pytest.raises(TypeError, match="artifact to be a bool"):
        ops.token_classes(massive, artifact.long())
