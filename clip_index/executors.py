"""How tasks are spread over workers. A job is a callable of one task; an executor calls it for every task.

A job is `run(task, report)`: `report(rows, failed)` is called from time to time with what was done since the last call,
and raises `Stopped` when the run is to end.

- `run_in_process`: this process, two tasks overlapping.
- `run_in_processes`: one spawned process a device, each taking the next task when it has room; a process that dies is
  replaced, and its tasks are tried again.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from clip_index.types import ClipIndexError, Task, UsageError

Result = TypeVar("Result")
Report = Callable[[int, int], None]
Job = Callable[[Task, Report], Result]

_OVERLAP = 2
"""Tasks at once in a process: the next one reads and decodes while the last batches of the one before are encoded."""
_ATTEMPTS = 3
"""A task whose process died this often is given up."""


class Stopped(Exception):
    """The run ends: another task failed, or the user asked."""


@dataclass(frozen=True)
class Lost:
    """A task that was given up, and how its process died the last time."""

    task: Task
    reason: str


def parse_devices(devices: str, cuda_devices: int) -> list[str]:
    """One device a worker: `auto`, `cpu`, `cpu*4`, `cuda`, `cuda:0,cuda:1`, `cuda:0*2`. Raises UsageError.

    `auto` is every CUDA device, or one CPU worker where there is none; `cuda` is every CUDA device.
    """
    every = [f"cuda:{number}" for number in range(cuda_devices)]
    if devices == "auto":
        return every or ["cpu"]
    found: list[str] = []
    for part in devices.split(","):
        match = re.fullmatch(r"\s*(cpu|cuda|cuda:\d+)\s*(?:\*\s*([1-9]\d*))?\s*", part)
        if not match:
            raise UsageError(f"devices: {part!r} is not a device; give auto, cpu, cpu*4, cuda, cuda:0 or cuda:0*2")
        names = every if match[1] == "cuda" else [match[1]]
        missing = [name for name in names or ["cuda:0"] if name != "cpu" and name not in every]
        if missing:
            raise UsageError(f"devices: there is no {missing[0]} here ({cuda_devices} CUDA devices found)")
        found += names * int(match[2] or 1)
    return found


def run_in_process(tasks: Iterable[Task], run: Job[Result], report: Report) -> Iterator[Result]:
    """Run every task in this process. Yields results as they come; the first exception ends the run."""
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
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(pending) >= ahead:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@dataclass
class _Worker:
    """A spawned process, as the parent sees it: its pipe, and the tasks it holds with what they reported."""

    job: Any
    process: Any
    connection: Connection
    tasks: dict[int, Task] = field(default_factory=dict)
    reported: Counter = field(default_factory=Counter)
    alone: bool = False


def run_in_processes(
    tasks: Iterable[Task],
    jobs: list[Job[Result]],
    report: Report,
    by_worker: Callable[[int, int], None] = lambda worker, samples: None,
) -> Iterator[Result | Lost]:
    """Run every task on a pool of spawned processes, one for each (picklable) job. Yields results as they come.

    `by_worker` is told which of them has done so many samples more.

    Tasks are handed out when a process has room, so none waits behind a slow one. A process that dies is replaced; its
    tasks are tried again, alone, and given up as `Lost` after three deaths. A ClipIndexError ends the run.
    """
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    again: deque[Task] = deque()
    deaths: Counter = Counter()
    fruitless = 0
    workers = [_spawn(context, job) for job in jobs]
    try:
        while True:
            _hand_out(workers, waiting, again)
            if not any(worker.tasks for worker in workers):
                return
            ready = wait_for([item for worker in workers for item in (worker.connection, worker.process.sentinel)], 0.5)
            for position, worker in enumerate(workers):
                if worker.connection not in ready and worker.process.sentinel not in ready:
                    continue
                try:
                    while worker.connection.poll():
                        kind, task, value = worker.connection.recv()
                        if kind == "report":
                            worker.reported.update({(task, "rows"): value[0], (task, "failed"): value[1]})
                            report(*value)
                            by_worker(position, sum(value))
                        elif kind == "error":
                            raise ClipIndexError(value)
                        elif kind == "crash":
                            worker.process.join()
                            raise EOFError(value)
                        else:
                            del worker.tasks[task]
                            fruitless = 0
                            yield value
                    if worker.process.is_alive():
                        continue
                    raise EOFError
                except (EOFError, OSError) as error:
                    worker.process.join()
                    reason = str(error) or f"its process ended with exit code {worker.process.exitcode}"
                fruitless += 1
                if fruitless > _ATTEMPTS * len(jobs) + _ATTEMPTS:
                    raise ClipIndexError(f"the worker processes die one after the other: {reason}")
                for number, task in worker.tasks.items():
                    report(-worker.reported[number, "rows"], -worker.reported[number, "failed"])
                    deaths[number] += 1
                    if deaths[number] < _ATTEMPTS:
                        again.append(task)
                    else:
                        yield Lost(task, reason)
                workers[position] = _spawn(context, worker.job)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _spawn(context: Any, job: Any) -> _Worker:
    connection, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return _Worker(job, process, connection)


def _hand_out(workers: list[_Worker], waiting: Iterator[Task], again: deque[Task]) -> None:
    """Give tasks to the processes that have room; one that saw a process die gets a process to itself."""
    for room in range(_OVERLAP):
        for worker in workers:
            if len(worker.tasks) != room or (worker.alone and worker.tasks):
                continue
            if again and not room:
                task, worker.alone = again.popleft(), True
            elif (fresh := next(waiting, None)) is not None:
                task, worker.alone = fresh, False
            else:
                continue
            worker.tasks[task.id] = task
            worker.reported = Counter({key: count for key, count in worker.reported.items() if key[0] in worker.tasks})
            # a process that has just died is noticed where its pipe is read
            _send(worker.connection, task)


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:
        return


def _work(connection: Connection, job: Job) -> None:
    """A worker process: runs the tasks that come through the pipe, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told of Ctrl-C, and ends its workers
    sending = threading.Lock()

    def tell(kind: str, task: Task, value: Any) -> None:
        with sending:
            connection.send((kind, task.id, value))

    def one(task: Task) -> None:
        try:
            tell("result", task, job(task, lambda rows, failed: tell("report", task, (rows, failed))))
        except ClipIndexError as error:
            tell("error", task, str(error))
        except BaseException as error:
            tell("crash", task, f"{type(error).__name__}: {error}")
            os._exit(1)

    with ThreadPoolExecutor(_OVERLAP, thread_name_prefix="task") as pool:
        while True:
            try:
                task = connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the parent is gone
            pool.submit(one, task)
