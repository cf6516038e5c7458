"""Embedding: what a run writes, what resume skips, what is refused, and what a killed run leaves."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from fakes import FakeEncoder, contents, make_pictures

from clip_index import storage, store
from clip_index.embed import embed
from clip_index.embed_job import encode_samples
from clip_index.embed_plan import plan_embedding
from clip_index.embed_preview import preview
from clip_index.markers import read_markers
from clip_index.types import ClipIndexError, Sample, UsageError
from clip_index.verify import verify


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    fakes.use(monkeypatch)


def run(source: Path, output: Path | str, **options):
    return embed(str(source), str(output), **{"batch_size": 4, "rows_per_shard": 8, **options})


def test_rows_are_the_encoders_rows_in_order(tmp_path):
    source = make_pictures(tmp_path / "in", 21)
    summary = run(source, tmp_path / "out")
    assert (summary.rows, summary.failed, summary.shards, summary.new_rows) == (21, 0, 3, 21)
    manifest = store.Manifest.load(str(tmp_path / "out"))
    assert manifest.complete and manifest.shard_rows == [8, 8, 5]
    encoder = FakeEncoder()
    for row in (0, 7, 8, 20):
        shard, offset = manifest.locate(row)
        picture = source / f"{row:04d}.png"
        pixels, size = encoder.preprocess(picture.read_bytes())
        expected = encoder.encode_image(pixels[None])[0].astype(np.float16)
        np.testing.assert_array_equal(store.read_vectors(summary.output, "image", shard)[offset], expected)
        caption = encoder.encode_text([f"picture number {row}"])[0].astype(np.float16)
        np.testing.assert_array_equal(store.read_vectors(summary.output, "text", shard)[offset], caption)
        told = store.read_metadata(summary.output, shard).to_pylist()[offset]
        assert told["image_path"] == told["source"] == str(picture)
        assert (told["caption"], told["key"]) == (f"picture number {row}", picture.name)
        assert (told["width"], told["height"]) == size
    assert verify(summary.output) == []


def test_bad_samples_are_recorded_and_the_run_goes_on(tmp_path):
    source = make_pictures(tmp_path / "in", 20)
    (source / "0003.png").write_bytes((source / "0003.png").read_bytes()[:200])
    (source / "0009.png").write_bytes(b"<html>not found</html>")
    summary = run(source, tmp_path / "out")
    assert (summary.rows, summary.failed) == (18, 2)
    assert [Path(name).name for name in summary.failed_files] == ["failed_00000.parquet", "failed_00001.parquet"]
    failed = store.read_failed(summary.output, 0).to_pylist()
    assert failed[0]["key"] == "0003.png" and failed[0]["source"].endswith("0003.png") and failed[0]["error"]
    keys = store.read_metadata(summary.output, 0)["key"].to_pylist()
    assert keys == [f"{i:04d}.png" for i in (0, 1, 2, 4, 5, 6, 7)]
    assert len(store.read_vectors(summary.output, "image", 0)) == 7
    assert verify(summary.output) == []


def test_vectors_that_are_not_finite_are_failures():
    class Broken(FakeEncoder):
        def encode_text(self, texts):
            vectors = super().encode_text(texts)
            vectors[1] = np.nan
            return vectors

    samples = [Sample(key=str(i), text=f"t{i}", source="s") for i in range(3)]
    vectors, rows, failures = encode_samples(Broken(), ("text",), samples)
    assert [row["key"] for row in rows] == ["0", "2"] and vectors["text"].shape == (2, 48)
    assert failures == [("1", "s", "its embedding is not finite")]


def test_a_second_run_does_nothing(tmp_path):
    source = make_pictures(tmp_path / "in", 10)
    run(source, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    summary = run(source, tmp_path / "out")
    assert (summary.new_rows, summary.skipped_shards, summary.rows) == (0, 2, 10)
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    assert {name for name in after if after[name] != before.get(name)} <= {"manifest.json"}


def test_resume_makes_only_what_has_no_marker(tmp_path):
    source = make_pictures(tmp_path / "in", 30)
    run(source, tmp_path / "whole")
    run(source, tmp_path / "out")
    (tmp_path / "out/done/00001.json").unlink()
    (tmp_path / "out/img_emb/img_emb_00001.npy").write_bytes(b"half")
    kept = (tmp_path / "out/img_emb/img_emb_00002.npy").stat().st_mtime_ns
    assert run(source, tmp_path / "out").new_rows == 8
    assert (tmp_path / "out/img_emb/img_emb_00002.npy").stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_batches_and_threads_do_not_change_rows(tmp_path):
    source = make_pictures(tmp_path / "in", 17)
    run(source, tmp_path / "a", batch_size=3)
    run(source, tmp_path / "b", batch_size=17)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "fake-2"}, "fingerprint: fake-1 -> fake-2"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"size": 64}, "preprocess.size: 32 -> 64"),
    ],
)
def test_other_embeddings_are_not_mixed_in(tmp_path, monkeypatch, change, says):
    source = make_pictures(tmp_path / "in", 3)
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    fakes.use(monkeypatch, **change)
    with pytest.raises(UsageError, match=says):
        run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_inputs_are_refused_unless_asked_for(tmp_path):
    source = make_pictures(tmp_path / "in", 20)
    run(source, tmp_path / "out")
    shutil.copy(source / "0000.png", source / "0010x.png")
    with pytest.raises(UsageError, match=r"2 of the 3 finished shards .* give --update"):
        run(source, tmp_path / "out")
    kept = (tmp_path / "out/img_emb/img_emb_00000.npy").stat().st_mtime_ns
    assert run(source, tmp_path / "out", update=True).rows == 21
    assert (tmp_path / "out/img_emb/img_emb_00000.npy").stat().st_mtime_ns == kept
    run(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_update_forgets_shards_that_have_no_inputs_left(tmp_path):
    source = make_pictures(tmp_path / "in", 20)
    run(source, tmp_path / "out")
    for i in range(8, 20):
        (source / f"{i:04d}.png").unlink()
    run(source, tmp_path / "out", update=True)
    run(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_failed_samples_are_tried_again_when_asked(tmp_path):
    source = make_pictures(tmp_path / "in", 16)
    good = (source / "0003.png").read_bytes()
    (source / "0003.png").write_bytes(bytes(len(good)))
    assert run(source, tmp_path / "out").failed == 1
    (source / "0003.png").write_bytes(good)
    assert run(source, tmp_path / "out").failed == 1
    assert run(source, tmp_path / "out", retry_failed=True).failed == 0
    run(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_too_many_failures_stop_the_run(tmp_path):
    source = make_pictures(tmp_path / "in", 150)
    for path in sorted(source.glob("*.png"))[60:]:
        path.write_bytes(b"broken")
    with pytest.raises(ClipIndexError, match=r"of 1\d\d samples failed, more than --max_failure_rate 0.3"):
        run(source, tmp_path / "out", max_failure_rate=0.3)
    done = list(read_markers(str(tmp_path / "out")))
    assert 3 <= len(done) < 19 and done[0].rows == 8
    assert run(source, tmp_path / "out", max_failure_rate=1.0).rows == 60


def test_max_failure_rate_holds_for_small_sets_too(tmp_path):
    source = make_pictures(tmp_path / "in", 2)
    (source / "0000.png").write_bytes(b"broken")
    assert run(source, tmp_path / "a", max_failure_rate=0.5).failed == 1
    with pytest.raises(ClipIndexError, match="1 of 2 samples failed"):
        run(source, tmp_path / "b", max_failure_rate=0.4)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"rows_per_shard": 0}, {"max_failure_rate": 1.5}])
def test_senseless_options(tmp_path, option):
    source = make_pictures(tmp_path / "in", 1)
    with pytest.raises(UsageError, match=next(iter(option))):
        run(source, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_preview_writes_nothing(tmp_path):
    source = make_pictures(tmp_path / "in", 20)
    (source / "0003.png").write_bytes(b"broken")
    told = preview(str(source), str(tmp_path / "out"), rows_per_shard=8)
    assert (told.samples, told.shards, told.tried, told.failed) == (20, 3, 8, 1)
    assert told.samples_per_s > 0 and told.bytes_per_sample == 2 * 2 * 48
    assert not (tmp_path / "out").exists()


def test_output_on_another_filesystem(tmp_path):
    source = make_pictures(tmp_path / "in", 12)
    run(source, tmp_path / "out")
    remote = f"memory://{tmp_path.name}/out"
    run(source, remote)
    assert verify(remote) == []
    for name, data in contents(tmp_path / "out").items():
        assert storage.read_bytes(f"{remote}/{name}") == data
    assert run(source, remote).skipped_shards == 2


# ---- faults


def start(source: Path, output: Path, pause: float = 0.02) -> subprocess.Popen:
    script = Path(__file__).with_name("fakes.py")
    return subprocess.Popen([sys.executable, str(script), str(source), str(output), str(pause)])


def kill_when(process: subprocess.Popen, moment) -> None:
    deadline = time.monotonic() + 60
    while not moment():
        assert process.poll() is None, "it ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


MOMENTS = {
    "the manifest is there": lambda out: (out / "manifest.json").exists(),
    "vectors are being written": lambda out: any(out.glob("img_emb/*.tmp")),
    "vectors have their name, their marker is missing": lambda out: (
        len(list(out.glob("img_emb/*.npy"))) > len(list(out.glob("done/*.json")))
    ),
    "metadata has its name": lambda out: any(out.glob("metadata/*.parquet")),
    "two shards are finished": lambda out: len(list(out.glob("done/*.json"))) >= 2,
    "five shards are finished": lambda out: len(list(out.glob("done/*.json"))) >= 5,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(tmp_path, moment):
    source = make_pictures(tmp_path / "in", 60)
    (source / "0011.png").write_bytes(b"broken")
    process = start(source, tmp_path / "out")
    kill_when(process, lambda: MOMENTS[moment](tmp_path / "out"))
    done = sorted(path.name for path in (tmp_path / "out/done").glob("*.json"))
    assert len(done) < 8
    assert run(source, tmp_path / "out").skipped_shards == len(done)
    run(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert verify(str(tmp_path / "out")) == []


def test_killed_again_and_again(tmp_path):
    source = make_pictures(tmp_path / "in", 60)
    random.seed(3)
    for _ in range(4):
        process = start(source, tmp_path / "out", pause=0.05)
        seen = set((tmp_path / "out").rglob("*"))
        kill_when(process, lambda: set((tmp_path / "out").rglob("*")) - seen)  # noqa: B023 - used before the next turn
        time.sleep(random.random() / 50)
    run(source, tmp_path / "out")
    run(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_interrupted_from_the_keyboard(tmp_path):
    source = make_pictures(tmp_path / "in", 60)
    process = start(source, tmp_path / "out", pause=0.1)
    while not list((tmp_path / "out/done").glob("*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert 0 < len(list(read_markers(str(tmp_path / "out")))) < 8
    plan = plan_embedding(str(source), str(tmp_path / "out"), batch_size=4, rows_per_shard=8)
    assert len(plan.todo) == 8 - len(plan.done)
