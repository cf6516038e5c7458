"""Ways to run tasks: in this process, and on a pool of processes that may die."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from clip_index import executors
from clip_index.executors import Lost, parse_devices, run_in_process, run_in_processes
from clip_index.types import ClipIndexError, Task, UsageError


def tasks(n: int) -> list[Task]:
    return [Task(i, ((f"in{i}", i),), 1) for i in range(n)]


def ignore(rows: int, failed: int) -> None:
    pass


@pytest.mark.parametrize(
    ("devices", "cuda", "expected"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cpu", 2, ["cpu"]),
        ("cpu*3", 0, ["cpu", "cpu", "cpu"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cuda:0, cuda:1", 2, ["cuda:0", "cuda:1"]),
        ("cuda:0*2,cpu", 1, ["cuda:0", "cuda:0", "cpu"]),
        ("cuda*2", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
    ],
)
def test_devices(devices, cuda, expected):
    assert parse_devices(devices, cuda) == expected


@pytest.mark.parametrize("devices", ["", "gpu", "cpu*0", "cpu*", "cuda:x", "cpu,,cpu"])
def test_what_is_not_a_device(devices):
    with pytest.raises(UsageError, match="is not a device; give auto, cpu"):
        parse_devices(devices, 1)


@pytest.mark.parametrize(("devices", "missing"), [("cuda", "cuda:0"), ("cuda:3", "cuda:3")])
def test_devices_that_are_not_there(devices, missing):
    with pytest.raises(UsageError, match=rf"there is no {missing} here"):
        parse_devices(devices, 0)


def test_in_process_all_tasks_run_two_at_a_time():
    running, most = Counter(), []

    def run(task, report):
        running[task.id] = 1
        most.append(sum(running.values()))
        time.sleep(0.01)
        running[task.id] = 0
        return task.id

    assert sorted(run_in_process(tasks(7), run, ignore)) == list(range(7))
    assert max(most) == 2


def test_in_process_the_first_error_ends_the_run():
    begun = []

    def run(task, report):
        begun.append(task.id)
        if task.id == 1:
            raise ClipIndexError("no space left")
        for _ in range(200):
            time.sleep(0.01)
            report(1, 0)
        return task.id

    started = time.monotonic()
    with pytest.raises(ClipIndexError, match="no space left"):
        list(run_in_process(tasks(50), run, ignore))
    assert len(begun) < 5 and time.monotonic() - started < 1.5


def test_ordered_map_is_ordered_and_bounded():
    taken, given = [], []

    def items():
        for i in range(20):
            given.append(i)
            yield i

    with executors.ThreadPoolExecutor(4) as pool:
        for result in executors.ordered_map(pool, lambda i: (time.sleep(0.001 * (i % 3)), i)[1], items(), 5):
            taken.append(result)
            assert len(given) - len(taken) <= 5
    assert taken == list(range(20))


@dataclass(frozen=True)
class Writes:
    """A job that notes each attempt in a folder; `behaviour` says what goes wrong for task 3."""

    folder: str
    behaviour: str = ""
    name: str = "a"

    def __call__(self, task: Task, report: executors.Report) -> tuple[int, str]:
        attempt = Path(self.folder, f"{task.id}-{time.monotonic_ns()}")
        attempt.write_text(f"{os.getpid()} {self.name}")
        report(2, 1)
        if task.id == 3:
            attempts = len(list(Path(self.folder).glob("3-*")))
            if self.behaviour == "always dies" or (self.behaviour == "dies once" and attempts == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.behaviour == "crashes" and attempts < 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if self.behaviour == "refuses":
                raise ClipIndexError("cannot write to out: Permission denied")
        time.sleep(0.02)
        return task.id, self.name


def attempts(folder: Path) -> Counter:
    return Counter(int(path.name.split("-")[0]) for path in folder.iterdir())


def test_processes_share_the_tasks(tmp_path):
    jobs = [Writes(str(tmp_path), name=name) for name in "ab"]
    samples = Counter()
    results = list(run_in_processes(tasks(30), jobs, ignore, lambda worker, count: samples.update({worker: count})))
    assert sorted(number for number, _ in results) == list(range(30))
    assert {name for _, name in results} == {"a", "b"}
    done = Counter(name for _, name in results)
    assert samples == {0: 3 * done["a"], 1: 3 * done["b"]}  # each task reports two rows and a failure
    assert set(attempts(tmp_path).values()) == {1}


@pytest.mark.parametrize("behaviour", ["dies once", "crashes"])
def test_a_task_whose_process_dies_is_tried_again(tmp_path, behaviour):
    counted = Counter()

    def report(rows: int, failed: int) -> None:
        counted.update(rows=rows, failed=failed)

    results = list(run_in_processes(tasks(8), [Writes(str(tmp_path), behaviour)] * 2, report))
    assert sorted(results) == [(i, "a") for i in range(8)]
    assert attempts(tmp_path)[3] == (2 if behaviour == "dies once" else 3)
    assert counted == {"rows": 16, "failed": 8}  # what died was not counted twice


def test_a_task_that_kills_every_process_is_given_up(tmp_path):
    results = list(run_in_processes(tasks(8), [Writes(str(tmp_path), "always dies")] * 2, ignore))
    (lost,) = [result for result in results if isinstance(result, Lost)]
    assert lost.task.id == 3 and "exit code -9" in lost.reason
    assert sorted(result[0] for result in results if result is not lost) == [0, 1, 2, 4, 5, 6, 7]
    assert attempts(tmp_path)[3] == 3


def test_an_error_of_the_output_ends_the_run(tmp_path):
    with pytest.raises(ClipIndexError, match="Permission denied"):
        list(run_in_processes(tasks(100), [Writes(str(tmp_path), "refuses")] * 2, ignore))
    assert len(attempts(tmp_path)) < 30


@dataclass(frozen=True)
class Dies:
    def __call__(self, task: Task, report: executors.Report) -> None:
        os._exit(7)


def test_processes_that_only_die_end_the_run():
    with pytest.raises(ClipIndexError, match="die one after the other: its process ended with exit code 7"):
        list(run_in_processes(tasks(100), [Dies()], ignore))


def test_leaving_early_ends_the_processes(tmp_path):
    run = run_in_processes(tasks(100), [Writes(str(tmp_path))] * 2, ignore)
    next(run)
    run.close()
    pids = {int(path.read_text().split()[0]) for path in tmp_path.iterdir()}
    time.sleep(0.1)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
