"""Whatever happens to a run, another one goes on to the bytes of an undisturbed one.

Workers, ranks and parents are killed at random moments; Spark's executors and Slurm's jobs are in their own files.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import pytest
from fakes import contents, make_pictures

from clip_index.cli import main
from clip_index.embed import embed
from clip_index.verify import verify

CLI = Path(__file__).with_name("fake_cli.py")
OPTIONS = {"batch_size": 4, "rows_per_shard": 4}
N = 100
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_pictures(tmp_path_factory.mktemp("faults") / "in", N)
    (folder / "0011.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def whole(source) -> dict[str, bytes]:
    """What one undisturbed process makes of the source."""
    with pytest.MonkeyPatch.context() as patch:
        fakes.use(patch)
        embed(str(source), str(source.parent / "whole"), **OPTIONS)
    return contents(source.parent / "whole")


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    fakes.use(monkeypatch)


def start(source: Path, output: Path, *options: object, pause: float = 0.1, **how) -> subprocess.Popen:
    words = [sys.executable, CLI, "embed", source, output, "--batch_size", 4, "--rows_per_shard", 4, *options]
    environ = {**os.environ, "FAKE_PAUSE": str(pause)}
    return subprocess.Popen([str(word) for word in words], env=environ, stderr=subprocess.PIPE, text=True, **how)


def done(output: Path) -> int:
    return len(list(output.glob("done/*.json")))


def wait_until(moment, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def some_way_on(output: Path, rng: random.Random, process: subprocess.Popen) -> bool:
    """Wait for another shard and a random moment more; False where the process has ended."""
    before = done(output)
    wait_until(lambda: done(output) > before or process.poll() is not None)
    time.sleep(rng.uniform(0, 0.15))
    return process.poll() is None


def workers(parent: int) -> list[int]:
    """The spawned workers of a run; multiprocessing has a process of its own beside them."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just died
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def check(source: Path, output: Path, whole: dict[str, bytes]) -> None:
    """Go on in one process: its bytes are those of the undisturbed run."""
    summary = embed(str(source), str(output), **OPTIONS)
    assert (summary.rows, summary.failed) == (N - 1, 1)
    assert contents(output) == whole and verify(str(output)) == []


@linux
def test_workers_killed_at_eight_moments(tmp_path, source, whole):
    rng = random.Random(1)
    process = start(source, tmp_path / "out", "--devices", "cpu*2")
    killed = 0
    while killed < 8 and some_way_on(tmp_path / "out", rng, process):
        alive = workers(process.pid)
        if alive:
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed += 1
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 3, told  # there is a broken picture, or a task that was hit three times
    assert killed == 8
    check(source, tmp_path / "out", whole)


def test_ranks_killed_at_seven_moments(tmp_path, source, whole):
    rng = random.Random(2)

    def rank(number: int) -> subprocess.Popen:
        return start(source, tmp_path / "out", "--rank", number, "--world", 3, "--devices", "cpu")

    ranks = [rank(number) for number in range(3)]
    for _ in range(7):
        number = rng.randrange(3)
        if some_way_on(tmp_path / "out", rng, ranks[number]):
            ranks[number].send_signal(signal.SIGKILL)
        ranks[number].communicate()
        ranks[number] = rank(number)  # as a scheduler requeues it
    told = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 3], told  # one rank has the broken picture
    assert main(["finalize", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == whole and verify(str(tmp_path / "out")) == []


@linux
def test_parents_killed_at_three_moments(tmp_path, source, whole):
    rng = random.Random(3)
    for _ in range(3):
        process = start(source, tmp_path / "out", "--devices", "cpu*2")
        assert some_way_on(tmp_path / "out", rng, process)
        orphans = workers(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 20)  # noqa: B023 - used at once
    check(source, tmp_path / "out", whole)


def test_two_runs_on_the_same_output(tmp_path, source, whole):
    runs = [start(source, tmp_path / "out", "--devices", "cpu", pause=0.02) for _ in range(2)]
    for run in runs:
        _, told = run.communicate(timeout=60)
        assert run.returncode == 3, told
    assert contents(tmp_path / "out") == whole and verify(str(tmp_path / "out")) == []


def test_two_runs_with_other_inputs_on_the_same_output(tmp_path, source, whole):
    other = make_pictures(tmp_path / "in", N + 30, suffix="jpg")
    runs = [start(folder, tmp_path / "out", "--devices", "cpu", pause=0.02) for folder in (source, other)]
    told = [run.communicate(timeout=60)[1] for run in runs]
    refusals = [text for run, text in zip(runs, told, strict=True) if run.returncode in (1, 2)]
    assert refusals and all("other inputs" in text for text in refusals)
    embed(str(source), str(tmp_path / "out"), update=True, **OPTIONS)
    assert contents(tmp_path / "out") == whole and verify(str(tmp_path / "out")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 kB. Mounting takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("devices", ["cpu", "cpu*2"])
def test_a_disk_that_fills(small_disk, source, whole, devices):
    process = start(source, small_disk / "out", "--devices", devices, pause=0)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert told.count("\n") == 1 and "No space left" in told and "finished shards are kept" in told
    assert 0 < done(small_disk / "out") < 25
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    check(source, small_disk / "out", whole)


def test_files_that_may_not_grow(tmp_path, source, whole):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))

    process = start(source, tmp_path / "out", "--devices", "cpu", pause=0, preexec_fn=limit)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "File too large" in told and done(tmp_path / "out") == 0
    check(source, tmp_path / "out", whole)


def test_a_clock_that_jumps(tmp_path, source, whole):
    script = (
        "import random, runpy, sys, time; clock = random.Random(4); time.time = lambda: clock.uniform(-1e9, 4e9);"
        f"time.time_ns = lambda: int(time.time() * 1e9); sys.argv[0] = {str(CLI)!r};"
        f"sys.path.insert(0, {str(CLI.parent)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = ["embed", source, tmp_path / "out", "--batch_size", 4, "--rows_per_shard", 4, "--devices", "cpu"]
    environ = {**os.environ, "FAKE_PAUSE": "0.02"}
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], env=environ)
    wait_until(lambda: done(tmp_path / "out") > 4)
    process.kill()
    process.wait()
    rng = random.Random(4)
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)
    check(source, tmp_path / "out", whole)
