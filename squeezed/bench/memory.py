"""Peak memory of a piece of work, on the device that it runs on."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch


class PeakMemory:
    """Most bytes that were in use since the last reading, above those at the start.

    On a GPU torch's own count; on a CPU the process, looked at a thousand times a second.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._ended = threading.Event()
        self._most = 0

    def __enter__(self) -> PeakMemory:
        self._base = self._now()
        if self._device.type != "cuda":
            threading.Thread(target=self._watch, daemon=True).start()
        self.read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def read(self) -> int:
        """The peak since the last reading; the next one begins."""
        if self._device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            most, self._most = max(self._most, self._now()), self._now()
        return max(0, most - self._base)

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._most = max(self._most, self._now())
