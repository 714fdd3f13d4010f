"""Seconds of the parts of a forward pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by name.

    On CUDA the device itself notes when a part begins and ends, and nobody waits for it in
    between: what is measured goes on as it does without a clock.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> float:
        """Seconds of a steady clock, once the device has caught up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what goes by inside the `with`."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(self.device))
        yield
        end.record(torch.cuda.current_stream(self.device))
        self._marks.append((name, start, end))

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds so far by name, 0 for a part that did not come; waits for the device."""
        for name, start, end in self._marks:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
        self._marks.clear()
        return self._seconds
