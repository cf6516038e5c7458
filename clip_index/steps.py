"""Seconds and peak memory of each step of a build.

Memory is what the process holds that is not a page of a file: a memory-mapped shard can be dropped and read again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator

_INTERVAL_S = 0.05


class Steps:
    """`seconds` and `peak_memory_bytes` by step; a step that runs twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Measure a block as part of a step."""
        peaks, ended, started = [own_memory()], threading.Event(), time.perf_counter()

        def watch() -> None:
            while not ended.wait(_INTERVAL_S):
                peaks[0] = max(peaks[0], own_memory())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
            self.peak_memory_bytes[step] = max(self.peak_memory_bytes.get(step, 0), peaks[0], own_memory())


def own_memory() -> int:
    """Bytes that the process holds now, pages of files left out where the system tells them apart."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared = file.read().split()[:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
