"""What `embed` says at its end, and instead of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clip_index.embed import EmbedSummary
from clip_index.embed_preview import Preview
from clip_index.embed_report import duration, format_failures, format_preview, format_summary
from clip_index.progress import Clock, format_rates


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (6.24, "6.2 s"),
        (61, "1 min 1 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 0 min"),
        (11100, "3 h 5 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def summary(**changes) -> EmbedSummary:
    values = {"output": "/e", "modalities": ("image", "text"), "rows": 12345, "failed": 0, "shards": 2,
              "skipped_shards": 0, "new_rows": 12345, "seconds": 100.0, "samples_per_s": 130.4}  # fmt: skip
    return EmbedSummary(**{**values, **changes})


def test_a_summary_says_what_the_folder_holds():
    assert format_summary(summary()) == "/e: 12,345 images with captions in 2 shards; 1 min 40 s, 130 samples/s"


def test_a_summary_says_what_was_there_already():
    said = format_summary(summary(modalities=("text",), skipped_shards=1, samples_per_s=0.0, seconds=2.0))
    assert said == "/e: 12,345 captions in 2 shards, 1 shard from earlier runs; 2.0 s"


def test_failures_name_their_file():
    assert format_failures(summary(failed=1, failed_files=["/e/failed/failed_00000.parquet"])) == (
        "1 sample could not be embedded; why is in /e/failed/failed_00000.parquet"
    )
    assert format_failures(summary(failed=5, failed_files=["a", "b", "c"])).endswith("why is in a and 2 more files")


def preview(**changes) -> Preview:
    values = {"source": "photos", "output": "/e", "model": "mini", "modalities": ("image",), "shards": 3,
              "finished_shards": 1, "finished_rows": 10000, "samples": 20000, "tried": 64, "failed": 2,
              "samples_per_s": 100.0, "bytes_per_sample": 768}  # fmt: skip
    return Preview(**{**values, **changes})


def test_a_preview_says_what_is_left_and_what_it_takes():
    said = format_preview(preview())
    assert "photos: 20,000 samples to embed as images, 2 shards" in said
    assert "/e: 1 shard finished, 10,000 rows" in said
    assert "64 samples: 2 failed, 100.0 samples/s" in said
    assert "3 min 20 s, 15.4 MB of vectors" in said  # 20,000 / 100 per second; 20,000 x 768 bytes
    assert said.endswith("nothing was written")


def test_a_preview_does_not_guess_what_only_reading_tells():
    said = format_preview(preview(samples=None))
    assert "needs" not in said and "photos: samples to embed" in said


def test_a_rate_needs_some_time(monkeypatch):
    now = iter([10.0, 10.001, 12.0])
    monkeypatch.setattr("clip_index.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    clock = Clock()
    clock.add(32)
    clock.add(32)
    assert clock.rate == 0
    clock.add(36)
    assert clock.rate == pytest.approx(34)  # what came after the first report, in two seconds


def test_rates_by_device():
    assert format_rates(["cuda:0", "cuda:1"], [2310.4, 1999.6]) == ["cuda:0 2,310/s", "cuda:1 2,000/s"]
    assert format_rates(["cuda:0", "cuda:1"], [2310.4, 0.0]) == []  # one has only begun
    many = [f"cuda:{number}" for number in range(8)]
    rates = [90.0, 80.0, 20.0, 85.0, 99.0, 70.0, 60.0, 50.0]
    assert format_rates(many, rates) == ["cuda:2 20/s to cuda:4 99/s"]
