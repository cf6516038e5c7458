"""Ranks: what the environment tells, what each does of the work, and what becomes of it together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from fakes import contents, make_pictures

from clip_index import executors, store
from clip_index.cli import main
from clip_index.cluster import Rank, find_rank
from clip_index.embed import embed
from clip_index.types import ClipIndexError, UsageError
from clip_index.verify import verify

# as Slurm 22.05 sets them, in the batch script of `sbatch --array=5-9:2 --ntasks=2` and in its srun
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "5",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}
STEP = BATCH | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "SIZE"), "23", strict=True)}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Rank()),
        (BATCH, Rank()),  # one process, whatever the job's number of tasks
        (STEP, Rank(1, 2, 1, 2)),
        (BATCH | ARRAY, Rank(1, 3)),
        (STEP | ARRAY, Rank(3, 6, 1, 2)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, Rank(1, 2, 1, 1)),
        (TORCHRUN, Rank(5, 8, 1, 4)),
        (BATCH | TORCHRUN, Rank(5, 8, 1, 4)),
        (OPEN_MPI, Rank(2, 3)),
        (STEP | {"PMI_RANK": "1", "PMI_SIZE": "2"}, Rank(1, 2)),
        ({"RANK": "3"}, Rank()),  # half of it means something else
        ({**ARRAY, "SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "2"}, Rank(1, 2)),
        (
            {**ARRAY, "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_COUNT": "1"},
            Rank(0, 1),
        ),
    ],
)
def test_the_environment_tells_the_rank(environ, expected):
    assert find_rank(None, None, environ) == expected


def test_what_is_asked_for_goes_before_the_environment():
    assert find_rank(2, 5, TORCHRUN) == Rank(2, 5)


@pytest.mark.parametrize(
    ("rank", "world", "environ", "says"),
    [
        (0, None, {}, "not only --rank"),
        (None, 2, TORCHRUN, "not only --world"),
        (2, 2, {}, "ranks count from 0"),
        (-1, 2, {}, "ranks count from 0"),
        (0, 0, {}, "ranks count from 0"),
        (None, None, {"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x', which is no number"),
        (None, None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "6"}, "has gaps"),
        (None, None, {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4"}, "has gaps"),
    ],
)
def test_ranks_that_make_no_sense(rank, world, environ, says):
    with pytest.raises(UsageError, match=says):
        find_rank(rank, world, environ)


@pytest.mark.parametrize(
    ("rank", "cuda", "expected"),
    [
        (Rank(), 8, "auto"),
        (Rank(1, 4, 1, 4), 0, "auto"),
        (Rank(1, 4, 1, 4), 4, "cuda:1"),
        (Rank(5, 8, 1, 4), 8, "cuda:1,cuda:5"),
        (Rank(1, 4, 1, 4), 1, "cuda:0"),  # the launcher shows each process a device of its own
        (Rank(3, 4, 3, 4), 2, "cuda:1"),
    ],
)
def test_processes_of_a_machine_share_its_devices(rank, cuda, expected):
    assert rank.devices(cuda) == expected


@pytest.fixture
def fake(monkeypatch):
    fakes.use(monkeypatch)


def run(source: Path, output: Path, **options):
    return embed(str(source), str(output), **{"batch_size": 4, "rows_per_shard": 8, **options})


def test_ranks_make_what_one_process_makes(tmp_path, fake, capsys):
    source = make_pictures(tmp_path / "in", 60)
    (source / "0011.png").write_bytes(b"broken")
    run(source, tmp_path / "whole")
    summaries = [run(source, tmp_path / "out", rank=rank, world=3) for rank in (2, 0, 1)]
    assert [(told.rank, told.shards, told.rows, told.failed) for told in summaries] == [
        (2, 2, 16, 0),
        (0, 3, 24, 0),
        (1, 3, 19, 1),
    ]
    assert [Path(name).name for told in summaries for name in told.failed_files] == ["failed_00001.parquet"]
    assert not store.Manifest.load(str(tmp_path / "out")).complete
    assert main(["finalize", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 59
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(str(tmp_path / "out")) == []


def test_a_rank_says_what_comes_after_it(tmp_path, fake, capsys):
    words = ["embed", str(make_pictures(tmp_path / "in", 4)), str(tmp_path / "out"), "--devices", "cpu"]
    assert main([*words, "--rank", "1", "--world", "2"]) == 0
    told = capsys.readouterr()
    assert "in 0 shards of rank 1 of 2" in told.out and f"clip-index finalize {tmp_path / 'out'}" in told.out + told.err


def test_finalize_names_what_is_missing(tmp_path, fake, capsys):
    source = make_pictures(tmp_path / "in", 60)
    run(source, tmp_path / "out", rank=1, world=3)
    assert main(["finalize", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "lacks 5 of 8 shards (00000, 00002, 00003, 00005, 00006)" in told
    assert main(["finalize", str(tmp_path / "in")]) == 1


def test_a_rank_does_again_only_what_is_its_own(tmp_path, fake):
    source = make_pictures(tmp_path / "in", 60)
    for rank in range(3):
        run(source, tmp_path / "out", rank=rank, world=3)
    kept = contents(tmp_path / "out")
    for shard in (3, 4):
        (tmp_path / f"out/done/{shard:05d}.json").unlink()
    told = run(source, tmp_path / "out", rank=0, world=3)
    assert (told.new_rows, told.skipped_shards) == (8, 2)
    assert contents(tmp_path / "out") == {name: kept[name] for name in kept if name != "done/00004.json"}


def test_ranks_update_together(tmp_path, fake):
    source = make_pictures(tmp_path / "in", 60)
    run(source, tmp_path / "out")
    for number in (20, 59):
        (source / f"{number:04d}.png").unlink()
        (source / f"{number:04d}.txt").unlink()
    with pytest.raises(UsageError, match="other inputs"):
        run(source, tmp_path / "out", rank=0, world=3)
    for rank in (1, 0, 2):
        run(source, tmp_path / "out", rank=rank, world=3, update=True)
    store.finalize(str(tmp_path / "out"), store.Manifest.load(str(tmp_path / "out")))
    run(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_rank_of_another_configuration_is_refused_even_at_the_same_moment(tmp_path, fake, monkeypatch):
    source = make_pictures(tmp_path / "in", 20)
    first_look = store.Manifest.write_first

    def other_was_faster(self, folder):
        config = store.EmbeddingConfig(**{**self.config.__dict__, "fingerprint": "fake-2"})
        first_look(store.Manifest(config, tasks=self.tasks, width=self.width), folder)
        return first_look(self, folder)

    monkeypatch.setattr(store.Manifest, "write_first", other_was_faster)
    with pytest.raises(UsageError, match="fingerprint: fake-2 -> fake-1"):
        run(source, tmp_path / "out", rank=0, world=2)
    assert not (tmp_path / "out/done").exists()


def test_ranks_with_other_inputs_notice(tmp_path, fake, monkeypatch):
    source, other = make_pictures(tmp_path / "in", 20), make_pictures(tmp_path / "other", 30)
    run_in_process = executors.run_in_process

    def meanwhile(*given):
        monkeypatch.setattr(executors, "run_in_process", run_in_process)
        run(other, tmp_path / "out", rank=1, world=2)
        return run_in_process(*given)

    monkeypatch.setattr(executors, "run_in_process", meanwhile)
    with pytest.raises(ClipIndexError, match="planned for 4 shards now, rank 0 found 3"):
        run(source, tmp_path / "out", rank=0, world=2)


CLI = Path(__file__).with_name("fake_cli.py")


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(CLI), *map(str, words)])


@pytest.mark.parametrize("devices", ["cpu*2", "ranks"])
def test_processes_make_what_one_process_makes(tmp_path, fake, devices):
    source = make_pictures(tmp_path / "in", 60)
    run(source, tmp_path / "whole")
    options = ["--batch_size", 4, "--rows_per_shard", 8]
    if devices == "ranks":  # all at once, on a folder that is not there yet
        parts = [["--rank", rank, "--world", 3, "--devices", "cpu"] for rank in range(3)]
    else:
        parts = [["--devices", devices]]
    running = [start("embed", source, tmp_path / "out", *options, *part) for part in parts]
    assert [process.wait(60) for process in running] == [0] * len(parts)
    if devices == "ranks":
        assert main(["finalize", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
