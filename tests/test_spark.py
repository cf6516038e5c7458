"""Spark with executors that are processes of their own: the same bytes, whatever dies."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from fakes import contents, make_pictures

from clip_index import spark
from clip_index.embed import embed
from clip_index.types import UsageError
from clip_index.verify import verify

TESTS = Path(__file__).parent
N = 44


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A master, two workers and two executors on this machine, with the fake encoder in their Python processes."""
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17")
    pyspark = pytest.importorskip("pyspark.sql", reason="pip install 'clip-index[spark]'")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text("import fake_cli")
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executorEnv.PYTHONPATH": os.pathsep.join([str(site), str(TESTS)]),
        "spark.executorEnv.FAKE_PAUSE": "0.05",
        "spark.pyspark.python": sys.executable,
    }
    builder = pyspark.SparkSession.builder.master("local-cluster[2,1,1024]").appName("test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        for name, value in settings.items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_pictures(tmp_path_factory.mktemp("spark") / "in", N)
    (folder / "0011.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def whole(source) -> dict[str, bytes]:
    """What one process makes of the source."""
    with pytest.MonkeyPatch.context() as patch:
        fakes.use(patch)
        run(source, source.parent / "whole")
    return contents(source.parent / "whole")


def run(source: Path, output: Path, **options):
    return embed(str(source), str(output), **{"batch_size": 2, "rows_per_shard": 4, **options})


def executors(session) -> list[int]:
    """The process ids of the session's executors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        backend = b"org.apache.spark.executor.CoarseGrainedExecutorBackend" in words
        if backend and session.sparkContext.applicationId.encode() in words:
            found.append(int(path.parent.name))
    return found


def test_spark_makes_what_one_process_makes(session, source, whole, tmp_path):
    told = run(source, tmp_path / "out", executor="spark")
    assert (told.rows, told.failed, told.shards, told.skipped_shards) == (N - 1, 1, 11, 0)
    assert contents(tmp_path / "out") == whole


def pipeline(monkeypatch, name: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(TESTS.parent / "pipelines" / name), run_name="__main__")


def test_the_pipeline_goes_on_where_it_stopped(session, source, whole, tmp_path, monkeypatch):
    shutil.copytree(source.parent / "whole", tmp_path / "out")
    for shard in (2, 7):
        (tmp_path / f"out/done/{shard:05d}.json").unlink()
    words = [source, tmp_path / "out", "--batch_size", 2, "--rows_per_shard", 4]
    with pytest.raises(SystemExit) as ended:
        pipeline(monkeypatch, "spark_embed.py", *words)
    assert ended.value.code == 3  # a sample could not be read
    assert contents(tmp_path / "out") == whole


def test_executors_fill_an_index(session, source, whole, tmp_path, monkeypatch):
    import faiss

    pipeline(monkeypatch, "spark_index.py", source.parent / "whole", tmp_path / "index", "--index_key", "IVF1,Flat")
    index = faiss.read_index(str(tmp_path / "index/image.index"))
    shards = [np.load(path) for path in sorted((source.parent / "whole/img_emb").glob("*.npy"))]
    vectors = np.concatenate(shards).astype(np.float32)
    assert index.ntotal == len(vectors) == N - 1
    np.testing.assert_array_equal(index.search(vectors, 1)[1][:, 0], np.arange(N - 1))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the executors in /proc")
def test_an_executor_that_is_killed(session, source, whole, tmp_path):
    output, killed = tmp_path / "out", []

    def kill() -> None:
        while len(list(output.glob("done/*.json"))) < 3:
            time.sleep(0.005)
        killed.append(executors(session)[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run(source, output, executor="spark").rows == N - 1
    killer.join(5)
    assert killed and killed[0] not in executors(session)
    assert contents(output) == whole and verify(str(output)) == []


def test_an_error_of_a_worker_is_told_in_one_line():
    told = """Traceback (most recent call last):
  File "worker.py", line 1, in main
    raise ClipIndexError("x")
clip_index.types.ClipIndexError: cannot write to /out: No space left on device; finished shards are kept

Driver stacktrace: Job aborted due to stage failure: Task 3 in stage 1.0 failed 4 times"""
    assert spark._reason(told) == "cannot write to /out: No space left on device; finished shards are kept"
    assert spark._reason("An error\nJob aborted due to stage failure: Task 3 failed 4 times\nDriver") == (
        "Spark gave up: Job aborted due to stage failure: Task 3 failed 4 times"
    )


def test_devices(monkeypatch):
    monkeypatch.setattr(spark, "_amount", lambda name: 2)
    assert (spark.choose_device("auto"), spark.choose_device("cpu")) == ("cuda", "cpu")
    monkeypatch.setattr(spark, "_amount", lambda name: 0)
    assert spark.choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="Spark says which GPU"):
        spark.choose_device("cuda:0")


def test_ranks_and_spark_do_not_go_together(source, tmp_path):
    with pytest.raises(UsageError, match="not both"):
        run(source, tmp_path / "out", executor="spark", rank=0, world=2)
