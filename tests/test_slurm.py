"""A real Slurm of one node, configured in a temporary folder: pipelines/embed.sbatch from submission to the index."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fakes
import pytest
from fakes import contents, make_pictures

from clip_index import store
from clip_index.embed import embed
from clip_index.verify import verify

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "pipelines/embed.sbatch"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
CPUS, GPUS = 8, 4  # as many as the script asks for, whatever the machine has

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def wait_until(moment, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


class Slurm:
    """Its daemons, and its commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {
            **os.environ,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
        }
        self.daemons: list[subprocess.Popen] = []

    def daemon(self, *words: str) -> None:
        log = open(self.folder / f"{words[0]}.out", "ab")  # noqa: SIM115
        process = subprocess.Popen(words, env=self.environ, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.daemons.append(process)

    def call(self, *words: object) -> subprocess.CompletedProcess:
        command = [str(word) for word in words]
        return subprocess.run(command, env=self.environ, cwd=self.folder, capture_output=True, text=True, timeout=120)

    def submit(self, *words: object) -> subprocess.CompletedProcess:
        """Run the script, two ranks on one core each, and wait for both."""
        return self.call("sbatch", "--wait", "--array=0-1", "--cpus-per-task=1", SCRIPT, *words)

    def jobs(self, name: str) -> list[str]:
        """The numbers of the jobs of a name that have not ended, as 7_1 for the second of an array."""
        return self.call("squeue", "--noheader", f"--name={name}", "--format=%i").stdout.split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (slurm-wlm and munge have it)")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs for root only")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    for path in [folder, *folder.parents]:
        if path.stat().st_mode & 0o055 != 0o055 and path.is_relative_to("/tmp/pytest-of-root"):
            path.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    host = socket.gethostname().split(".")[0]
    settings = {"host": host, "user": "root", "ports": free_ports(2), "folder": folder, "cpus": CPUS, "gpus": GPUS}
    (folder / "slurm.conf").write_text(CONFIG.format(**settings))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("")
    command = folder / "bin/clip-index"
    # jobs get no environment but what the script names
    pause = f"export FAKE_PAUSE=$(cat {folder}/pause 2>/dev/null || echo 0)"
    command.write_text(f'#!/bin/sh\n{pause}\nexec {sys.executable} {TESTS}/fake_cli.py "$@"\n')
    command.chmod(0o755)
    slurm = Slurm(folder)
    try:
        munge = [f"--{name}={folder}/munge.{end}" for name, end in {"key-file": "key", "socket": "socket"}.items()]
        munge += [f"--{name}={folder}/munged.{name}" for name in ("pid-file", "log-file", "seed-file")]
        slurm.daemon("munged", "--foreground", "--force", *munge)
        wait_until((folder / "munge.socket").exists)
        slurm.daemon("slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf")
        slurm.daemon("slurmd", "-D", "-c", "-f", f"{folder}/slurm.conf")
        deadline = time.monotonic() + 30
        while "idle" not in (state := slurm.call("sinfo", "--noheader", "--format=%T")).stdout:
            if time.monotonic() > deadline:
                log = "".join(path.read_text()[-500:] for path in folder.glob("slurm*.log"))
                pytest.skip(f"this machine cannot run a Slurm node: {state.stdout}{state.stderr}{log}")
            time.sleep(0.2)
        yield slurm
    finally:
        slurm.call("scancel", "--user=root")
        wait_until(lambda: not slurm.call("squeue", "--noheader").stdout.strip(), 20)
        for process in reversed(slurm.daemons):
            process.terminate()
        for process in slurm.daemons:
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_pictures(tmp_path_factory.mktemp("in") / "in", 60)
    (folder / "0011.png").write_bytes(b"broken")
    return folder


OPTIONS = {"batch_size": 4, "rows_per_shard": 8}


@pytest.fixture(scope="module")
def whole(source) -> dict[str, bytes]:
    """What one process makes of the source."""
    with pytest.MonkeyPatch.context() as patch:
        fakes.use(patch)
        embed(str(source), str(source.parent / "whole"), **OPTIONS)
    return contents(source.parent / "whole")


def words(source: Path, folder: Path) -> list[object]:
    options = [item for name, value in OPTIONS.items() for item in (f"--{name}", value)]
    return [source, folder / "out", folder / "index", "--devices", "cpu", *options]


def test_an_array_of_ranks_makes_what_one_process_makes(slurm, source, whole, tmp_path):
    told = slurm.submit(*words(source, tmp_path))
    assert told.returncode == 0, told.stderr + "".join(path.read_text() for path in slurm.folder.glob("*.log"))
    wait_until((tmp_path / "index/clip_index.json").exists)
    assert contents(tmp_path / "out") == whole
    logs = [path.read_text() for path in sorted(slurm.folder.glob("clip-index-*_[01].log"))]
    assert "of rank 0 of 2" in logs[0] and "of rank 1 of 2" in logs[1]


def test_a_rank_that_is_killed_fails_the_job_and_the_same_command_goes_on(slurm, source, whole, tmp_path):
    def kill() -> None:
        wait_until(lambda: any((tmp_path / "out/done").glob("0000[13].json")))
        victim = next(job for job in slurm.jobs("clip-index") if job.endswith("_1"))
        slurm.call("scancel", "--signal=KILL", "--full", victim)

    (slurm.folder / "pause").write_text("0.3")
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    told = slurm.submit(*words(source, tmp_path))
    killer.join()
    assert told.returncode != 0 and not store.Manifest.load(str(tmp_path / "out")).complete
    wait_until(lambda: not slurm.jobs("clip-index-finalize"))  # cancelled, as it depends on both
    assert not (tmp_path / "index").exists()
    (slurm.folder / "pause").unlink()
    assert slurm.submit(*words(source, tmp_path)).returncode == 0
    wait_until((tmp_path / "index/clip_index.json").exists)
    assert contents(tmp_path / "out") == whole and verify(str(tmp_path / "out")) == []


def test_several_ranks_a_job(slurm, source, whole, tmp_path):
    shape = ["--array=3", "--ntasks=3", "--cpus-per-task=1"]
    assert slurm.call("sbatch", "--wait", *shape, SCRIPT, *words(source, tmp_path)).returncode == 0
    wait_until((tmp_path / "index/clip_index.json").exists)
    assert contents(tmp_path / "out") == whole


def test_more_ranks_than_run_at_once(slurm, source, whole, tmp_path):
    shape = ["--array=0-4%2", "--cpus-per-task=1"]
    assert slurm.call("sbatch", "--wait", *shape, SCRIPT, *words(source, tmp_path)).returncode == 0
    wait_until((tmp_path / "index/clip_index.json").exists)
    assert contents(tmp_path / "out") == whole
    last = max(slurm.folder.glob("clip-index-*_4.log"), key=lambda path: path.stat().st_mtime)
    assert "of rank 4 of 5" in last.read_text()
