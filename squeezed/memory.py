"""Peak memory of a piece of work, in the host's memory or on a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Most bytes in use since the last reading, above those at the start.

    On a GPU torch's own count. On a CPU the process's own memory, looked at every `interval` seconds; where the system
    tells, without the files that it has mapped: their pages can be taken back at any time.
    """

    def __init__(self, device: torch.device, interval: float = 0.01) -> None:
        self._device, self._interval, self._process = device, interval, psutil.Process()
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
        try:
            lines = _STATUS.read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        except (OSError, StopIteration):
            return int(self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._most = max(self._most, self._now())
