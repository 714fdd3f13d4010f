"""What a patch costs and saves: latency and its parts, peak memory, FLOPs, break-even."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fna_lab import ops
from fna_lab.attn.base import AttentionVariant
from fna_lab.attn.stopwatch import Stopwatch


class Timed(Protocol):
    """What a patch shows to the clock."""

    stopwatch: Stopwatch | None


@torch.inference_mode()  # as the trainer runs a model
def latency(
    runs: dict[str, tuple[Callable[[], object], Timed | None]],
    device: torch.device,
    *,
    seconds: float = 4.0,
    rounds: int = 15,
    least: int = 3,
) -> dict[str, dict[str, Any]]:
    """Median seconds of several runs, interleaved so that a noisy machine treats them alike.

    Args:
        runs: name -> (what to run, the patch that it runs under or None).
        device: the device to wait for.
        seconds: stop after about so long.
        rounds: most rounds.
        least: fewest rounds.

    Returns:
        name -> `total` with its quartiles `low` and `high`, and for a patch `attention` (without
        selection), `selection`, `rest`; and `rounds`, with the `totals` of each for `ratio`.
    """
    # glibc keeps memory for reuse once it has seen a large tensor come and go, as in every model.
    # Before that each call takes its memory from the system, which costs more than a mask does.
    torch.empty(31 << 20, dtype=torch.uint8)
    for run, _ in runs.values():  # warm-up: caches, kernel choice
        run()
    noted: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, (run, patch) in runs.items():
            watch = Stopwatch(device)
            start = watch.now()
            if patch is not None:
                patch.stopwatch = watch
            try:
                run()
            finally:
                if patch is not None:
                    patch.stopwatch = None
            total = watch.now() - start
            parts = {"total": total}
            if patch is not None:
                selection = watch.seconds["selection"]
                attention = watch.seconds["attention"] - selection
                rest = total - attention - selection
                parts |= {"selection": selection, "attention": attention, "rest": rest}
            noted[name].append(parts)
    found: dict[str, dict[str, Any]] = {}
    for name, rows in noted.items():
        found[name] = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        totals = torch.tensor([row["total"] for row in rows], dtype=torch.double)
        quartiles = totals.quantile(totals.new_tensor([0.25, 0.75])).tolist()
        found[name] |= {"low": quartiles[0], "high": quartiles[1], "rounds": len(rows)}
        found[name]["totals"] = [row["total"] for row in rows]
    return found


def ratio(times: Mapping[str, Mapping[str, Any]], over: str, under: str) -> float:
    """How many times as long one run of `latency` takes as another: the median over rounds.

    Both runs of a round had the machine as it was then; their medians may be of different rounds.
    """
    pairs = zip(times[over]["totals"], times[under]["totals"], strict=True)
    return statistics.median(a / b for a, b in pairs)


@torch.no_grad()
def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run takes on top of what was taken before, at its peak.

    On CUDA the allocator says it. On the CPU every new tensor is counted from its making to its
    release; what an operator takes and returns within itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with TensorBytes() as counted:
        run()
    return counted.peak


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the `with`.

    Attributes:
        held: bytes now.
        peak: most bytes at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,  # noqa: ARG002
    ) -> Any:
        """Run an operator; what comes in was there before, what else comes out is new."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, new=True)
        return out

    def _note(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def release(_: object) -> None:
            self._known.pop(key, None)
            self.held -= size

        self._known[key] = weakref.ref(storage, release)
        self.held += size
        self.peak = max(self.peak, self.held)


def flops(
    attn: AttentionVariant, *, tokens: int, heads: int, embed_dim: int, layers: int
) -> dict[str, float | None]:
    """Attention FLOPs of one picture by formula, and the break-even number of tokens.

    Args:
        attn: the variant.
        tokens: tokens of a picture.
        heads: attention heads.
        embed_dim: channels of a token.
        layers: blocks whose attention is replaced.

    Returns:
        `attention_gflops`, `exact_attention_gflops` of those blocks, selection included, and
        `break_even_tokens` (None = the variant is never cheaper).
    """
    shape = {"heads": heads, "head_dim": embed_dim // heads, "channels": embed_dim}
    shape["layers"] = layers

    def exact(n: int) -> int:
        return layers * ops.attention_flops(n, heads, embed_dim // heads)

    def variant(n: int) -> int:
        return attn.flops(n, **shape)

    return {
        "attention_gflops": variant(tokens) / 1e9,
        "exact_attention_gflops": exact(tokens) / 1e9,
        "break_even_tokens": ops.break_even_tokens(variant, exact, least=attn.min_tokens),
    }
