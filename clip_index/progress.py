"""The progress bar of `clip-index embed`: samples, rate, time left, failures; on stderr, on a terminal only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from clip_index.embed import Progress

if TYPE_CHECKING:
    from clip_index.embed import EmbedPlan


class Bar(Progress):
    """Starts at what earlier runs have done. Where the rows are not known beforehand, they are extrapolated."""

    def __init__(self, plan: EmbedPlan):
        from tqdm import tqdm

        super().__init__(plan)
        done = list(plan.done.values())
        self._known = None if any(task.rows is None for task in plan.tasks) else sum(task.rows for task in plan.tasks)
        self._failed = sum(shard.failed for shard in done)
        self._rows_per_shard = sum(shard.rows + shard.failed for shard in done) / len(done) if done else None
        self._bar = tqdm(
            total=self._total(),
            initial=sum(shard.rows + shard.failed for shard in done),
            desc="embed",
            unit=" samples",
            smoothing=0.1,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._show_failed()

    def _total(self) -> int | None:
        if self._known is not None:
            return self._known
        return round(self._rows_per_shard * len(self.plan.tasks)) if self._rows_per_shard else None

    def _show_failed(self) -> None:
        self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, rows: int, failed: int) -> None:
        """So many rows and failures more."""
        if failed:
            self._failed += failed
            self._show_failed()
        self._bar.update(rows + failed)

    def shard_done(self, rows: int, shards: int) -> None:
        """So many rows in so many finished shards: the total is extrapolated from them."""
        if self._known is None and shards:
            self._rows_per_shard = rows / shards
            self._bar.total = max(self._total() or 0, self._bar.n)
