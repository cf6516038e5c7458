"""How tasks are spread over workers. A job is a callable of one task; an executor calls it for every task.

A job is `run(task, report)`: `report(rows, failed)` is called from time to time with what was done since the last call,
and raises `Stopped` when the run is to end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from clip_index.types import Task

Result = TypeVar("Result")
Report = Callable[[int, int], None]
Job = Callable[[Task, Report], Result]

_OVERLAP = 2  # the next task reads and decodes while the last batches of the one before are encoded


class Stopped(Exception):
    """The run ends: another task failed, or the user asked."""


def run_in_process(tasks: Iterable[Task], run: Job[Result], report: Report) -> Iterator[Result]:
    """Run every task in this process, two at a time so that one's end overlaps with the next one's start.

    Yields results as they come. The first exception stops the others and is raised.
    """
    stop = threading.Event()

    def checked(rows: int, failed: int) -> None:
        if stop.is_set():
            raise Stopped
        report(rows, failed)

    waiting = iter(tasks)
    running: set[Future[Result]] = set()
    with ThreadPoolExecutor(_OVERLAP, thread_name_prefix="task") as pool:
        try:
            while True:
                while len(running) < _OVERLAP and (task := next(waiting, None)) is not None:
                    running.add(pool.submit(run, task, checked))
                if not running:
                    return
                # a bounded wait, so that Ctrl-C is noticed on every platform
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            stop.set()


def ordered_map(
    pool: ThreadPoolExecutor, function: Callable[..., Result], items: Iterable, ahead: int
) -> Iterator[Result]:
    """`map` over a shared pool, in order, with at most `ahead` items submitted and not yet taken."""
    pending: list[Future[Result]] = []
    try:
        for item in items:
            if len(pending) >= ahead:
                yield pending.pop(0).result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.pop(0).result()
    finally:
        for future in pending:
            future.cancel()
