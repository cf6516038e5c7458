"""Watching a run: what a caller is told, how fast it goes, whether too much fails; and the bar on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from clip_index.types import ClipIndexError

if TYPE_CHECKING:
    from clip_index.embed_plan import EmbedPlan

_JUDGED_FROM = 100
"""The failure rate is judged once this many samples have been seen, or at the end."""
_TIMED_FROM_S = 0.5
_NAMED = 4


class Progress:
    """Told what was done; the base class shows nothing."""

    def __init__(self, plan: EmbedPlan):
        self.plan = plan

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, rows: int, failed: int) -> None:
        """So many rows and failures more."""

    def by_device(self, device: int, samples: int) -> None:
        """So many samples of those came from one of several devices of the plan."""

    def shard_done(self, rows: int, shards: int) -> None:
        """So many samples are now in so many finished shards."""


class Clock:
    """Samples per second between the first report and the last."""

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self._samples = 0

    def add(self, samples: int) -> None:
        self._last = time.monotonic()
        if self._first:
            self._samples += samples
        else:
            self._first = self._last

    @property
    def rate(self) -> float:
        """0 where it was too short to say."""
        seconds = self._last - self._first
        return self._samples / seconds if seconds >= _TIMED_FROM_S else 0.0


class Judge:
    """Stops a run whose failure rate is too high, before its next shard is marked as finished."""

    def __init__(self, limit: float, rows: int, failed: int):
        self.limit, self.rows, self.failed = limit, rows, failed

    def add(self, rows: int, failed: int) -> None:
        self.rows += rows
        self.failed += failed
        if self.rows + self.failed >= _JUDGED_FROM:
            self.end()

    def end(self) -> None:
        seen = self.rows + self.failed
        if self.failed > self.limit * seen:
            raise ClipIndexError(
                f"{self.failed} of {seen} samples failed, more than --max_failure_rate {self.limit:g} allows; "
                "finished shards are kept, and their failures are listed under failed/"
            )


class Bar(Progress):
    """Starts at what earlier runs have done. Where the rows are not known beforehand, they are extrapolated."""

    def __init__(self, plan: EmbedPlan):
        from tqdm import tqdm

        super().__init__(plan)
        done = int(plan.done.rows.sum() + plan.done.failed.sum())
        self._known = None if any(task.rows is None for task in plan.tasks) else sum(task.rows for task in plan.tasks)
        self._failed = int(plan.done.failed.sum())
        self._rows_per_shard = done / len(plan.done) if len(plan.done) else None
        self._bar = tqdm(
            total=self._total(),
            initial=done,
            desc="embed",
            unit=" samples",
            smoothing=0.1,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._clocks = [Clock() for _ in plan.devices]
        self._show_state()

    def _total(self) -> int | None:
        if self._known is not None:
            return self._known
        return round(self._rows_per_shard * len(self.plan.tasks)) if self._rows_per_shard else None

    def _show_state(self) -> None:
        rates = format_rates(self.plan.devices, [clock.rate for clock in self._clocks])
        self._bar.set_postfix_str(", ".join([f"{self._failed} failed", *rates]), refresh=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, rows: int, failed: int) -> None:
        """So many rows and failures more."""
        if failed:
            self._failed += failed
            self._show_state()
        self._bar.update(rows + failed)

    def shard_done(self, rows: int, shards: int) -> None:
        """So many rows in so many finished shards: the total is extrapolated from them."""
        if self._known is None and shards:
            self._rows_per_shard = rows / shards
            self._bar.total = max(self._total() or 0, self._bar.n)

    def by_device(self, device: int, samples: int) -> None:
        """So many samples of those came from one of several devices of the plan."""
        self._clocks[device].add(samples)
        self._show_state()


def format_rates(devices: list[str], rates: list[float]) -> list[str]:
    """Samples a second of each of several devices, once all are known; of many the fastest and the slowest."""
    if not all(rates):
        return []
    if len(devices) <= _NAMED:
        return [f"{device} {rate:,.0f}/s" for device, rate in zip(devices, rates, strict=True)]
    slowest, fastest = (rates.index(edge(rates)) for edge in (min, max))
    return [f"{devices[slowest]} {rates[slowest]:,.0f}/s to {devices[fastest]} {rates[fastest]:,.0f}/s"]
