"""Downloading a list of URLs with img2dataset into a folder that `clip-index embed` reads.

1. The list's files are found and compared with what the folder was begun with; a folder that is finished is left alone.
2. Columns are chosen, and the list is made one that img2dataset reads (`url_lists`).
3. What an interrupted run has left half done is removed (`download_folder`).
4. img2dataset runs in a process of its own; finished shards are counted while it does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from clip_index import storage, url_lists
from clip_index.download_folder import DownloadFolder, reasons
from clip_index.download_options import DownloadOptions
from clip_index.img2dataset_process import WITHOUT_WANDB
from clip_index.types import ClipIndexError, UsageError

_LONG_LIST = 100_000
_EVERY_S = 0.25


@dataclass(frozen=True)
class DownloadSummary:
    """What a folder holds after a download; `skipped_shards` are those of earlier runs."""

    output: str
    samples: int
    downloaded: int
    failed: int
    reasons: dict[str, int]
    shards: int
    skipped_shards: int
    seconds: float

    def why(self, shown: int = 3) -> str:
        """The commonest reasons of failures, with their numbers."""
        told = [f"{number:,} {reason}" for reason, number in list(self.reasons.items())[:shown]]
        rest = sum(list(self.reasons.values())[shown:])
        return ", ".join([*told, *([f"{rest:,} others"] if rest else [])])


Watch = Callable[[int, int, int, int], None]
"""Told (samples of the list, samples done, failed ones among them, bytes in the folder) while a download runs."""


def download(
    source: str,
    output: str,
    options: DownloadOptions | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    watch: Watch | None = None,
) -> DownloadSummary:
    """Download the pictures of a list, or go on with what an earlier run began.

    `source` is a csv, tsv, json, jsonl, txt or parquet file of URLs, or a folder of them; `output` a folder. `say` is
    told what is chosen and what was found. Raises UsageError, before anything is fetched, for a list without URLs and
    for a folder of another download; ClipIndexError where img2dataset is missing or fails, or no picture came.
    """
    options = options or DownloadOptions()
    options.check()
    started = time.monotonic()
    files = url_lists.find(source, options.input_format)
    folder = DownloadFolder(output, options.output_format)
    identity = {"version": 1, "list": url_lists.digest(files), "options": options.deciding()}
    overwrite = options.incremental_mode == "overwrite"
    marker, done = folder.marker(), folder.finished()
    if not overwrite:
        _refuse_others(folder, marker, identity)
    if overwrite or not marker or _missing(marker, done):
        _require_img2dataset()
        with tempfile.TemporaryDirectory(prefix="clip-index-") as temporary:
            prepared = _prepare(source, files, options, temporary, say)
            size = options.number_sample_per_shard or (1000 if sum(prepared.rows) < _LONG_LIST else 10_000)
            marker = {**identity, "shards": sum(math.ceil(rows / size) for rows in prepared.rows)}
            with storage.exclusive(storage.join(folder.path, "download")):
                if overwrite:
                    folder.remove_all()
                folder.remove_unfinished()
                done = folder.finished()
                if done:
                    say(f"{output}: {len(done)} of {marker['shards']} shards are there from earlier runs")
                folder.mark({**marker, "samples": sum(prepared.rows)})
                if _missing(marker, done):
                    _run(folder, prepared, options, size, watch)
    return _summary(folder, output, len(done), time.monotonic() - started)


def _refuse_others(folder: DownloadFolder, marker: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UsageError where a folder's shards were made from another list, or with other options."""
    if not folder.begun():
        return
    if not marker:  # img2dataset's own
        if not folder.finished():
            raise UsageError(f"{folder.path} holds a download of another --output_format: name another folder")
        return
    old, new = marker.get("options", {}), identity["options"]
    differences = [f"{name}: {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
    if marker.get("list") != identity["list"]:
        differences.insert(0, "another list of URLs")
    if differences:
        raise UsageError(
            f"{folder.path} was begun with other things ({'; '.join(differences)}): name another folder, "
            "or give --incremental_mode overwrite to download it anew"
        )


def _require_img2dataset() -> None:
    if importlib.util.find_spec("img2dataset") is None:
        raise ClipIndexError(
            "img2dataset is not installed, and it does the downloading: pip install 'clip-index[download]'"
        )


def _prepare(
    source: str, files: list[url_lists.ListFile], options: DownloadOptions, folder: str, say: Callable[[str], None]
) -> url_lists.UrlList:
    verified = options.words("verify_hash") or []
    prepared = url_lists.prepare(
        files,
        folder,
        url=options.url_col,
        caption=options.caption_col,
        others=options.words("save_additional_columns"),
        needed=[name for name in (options.bbox_col, *verified[:1]) if name],
    )
    say(f"{source}: {sum(prepared.rows):,} rows, {prepared.columns}")
    if prepared.left_out:
        say(f"{source}: {prepared.left_out:,} rows left out, they have too few or too many cells")
    return prepared


def _run(
    folder: DownloadFolder,
    prepared: url_lists.UrlList,
    options: DownloadOptions,
    size: int,
    watch: Watch | None,
) -> None:
    """Have img2dataset download what is missing. Raises ClipIndexError where it leaves shards out."""
    columns, marker = prepared.columns, folder.marker()
    arguments = options.arguments() | {
        "url_list": prepared.folder,
        "output_folder": folder.path,
        "input_format": "parquet",
        "url_col": columns.url,
        "caption_col": columns.caption,
        "save_additional_columns": list(columns.others) or None,
        "number_sample_per_shard": size,
        "processes_count": min(options.processes_count or _cores(), _missing(marker, folder.finished())),
    }
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # it asks the internet for its newest version
    if not options.enable_wandb:
        environment[WITHOUT_WANDB] = "1"
    # its last seconds are for a summary that is not shown
    hasty = options.distributor == "multiprocessing" and not options.enable_wandb
    with tempfile.TemporaryFile() as log:
        try:
            with _process(arguments, environment, log) as process:
                while process.poll() is None:
                    done = folder.finished()
                    if hasty and not _missing(marker, done):
                        break
                    if watch is not None:
                        counts = [sum(stats[name] for stats in done.values()) for name in ("count", "successes")]
                        watch(marker["samples"], counts[0], counts[0] - counts[1], folder.bytes())
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_EVERY_S)
        finally:
            folder.remove_unfinished()
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    if missing := _missing(marker, folder.finished()):
        left = f"{missing} of {marker['shards']} shards are missing; run the command again to go on"
        raise ClipIndexError(f"img2dataset failed: {_reason(said, process.returncode)}; {left}")


def _missing(marker: dict[str, Any], done: dict[int, Any]) -> int:
    """How many shards a download still lacks."""
    return len(set(range(marker["shards"])) - done.keys())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _process(
    arguments: dict[str, Any], environment: dict[str, str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """img2dataset with its workers, all of them ended with the block."""
    command = [sys.executable, "-m", "clip_index.img2dataset_process"]
    streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
    with subprocess.Popen(command, **streams, env=environment, start_new_session=True) as process:
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(arguments).encode() + b"\n")
                process.stdin.flush()
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _reason(said: str, status: int) -> str:
    """What img2dataset's output says went wrong."""
    found = re.findall(r"^shard \d+ failed with error (.+)$|^(?:[\w.]*\.)?(\w*(?:Error|Exception): .+)$", said, re.M)
    if found:
        return found[0][0] or found[0][1]  # what comes after the first is what other processes say of it
    lines = said.split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"it ended with status {status}")


def _summary(folder: DownloadFolder, output: str, skipped: int, seconds: float) -> DownloadSummary:
    done = folder.finished()
    found = reasons(done)
    samples, downloaded = (sum(stats[name] for stats in done.values()) for name in ("count", "successes"))
    summary = DownloadSummary(
        output=folder.path,
        samples=samples,
        downloaded=downloaded,
        failed=samples - downloaded,
        reasons=dict(found.most_common()),
        shards=len(done),
        skipped_shards=skipped,
        seconds=seconds,
    )
    if not downloaded:
        folder.remove_all()  # there is nothing to keep, and the next run shall try again
        raise ClipIndexError(f"{output}: none of {samples} pictures could be downloaded: {summary.why()}")
    return summary
