"""The commands, each a thin function: import what does the work, call it, print what it says, name the next command.

A parameter's annotation and its line under `Args:` are all that the command line and its help are made from. Heavy
modules are imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict
from typing import Literal

from clip_index import front_door
from clip_index._version import __version__
from clip_index.build import build_index
from clip_index.change import append, delete, merge
from clip_index.command import Program
from clip_index.console import beside, count, note, print_json, suggest
from clip_index.convert import convert
from clip_index.dedup import dedup
from clip_index.download import download
from clip_index.end2end import end2end
from clip_index.export import export
from clip_index.filter import filter
from clip_index.query import query


def demo(*, output: str = "clip-index-demo") -> None:
    """Embed, index and search the sample pictures that come with the package, offline.

    Makes embeddings/, index/ and sheet.html in the output folder, and says how long each step took. It can be run
    again: what is finished is kept.

    Examples:
        clip-index demo

    Args:
        output: folder for the results
    """
    from clip_index.demo import run

    run(output)


def embed(
    input: str,
    output: str,
    *,
    model: str = "mini",
    input_format: Literal["auto", "files", "webdataset", "parquet"] = "auto",
    modality: Literal["auto", "image", "text", "image,text"] = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    devices: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto",
    decode: Literal["exact", "fast"] = "exact",
    batch_size: int | None = None,
    rows_per_shard: int = 10_000,
    max_failure_rate: float = 0.5,
    update: bool = False,
    retry_failed: bool = False,
    rank: int | None = None,
    world: int | None = None,
    executor: Literal["local", "spark"] = "local",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Embed pictures and captions into a folder of shards.

    Run again, it goes on where it stopped. Samples that cannot be read are listed under failed/ and the exit status is
    3.

    Examples:
        clip-index embed photos/ embeddings/
        clip-index embed "dataset/{00000..00099}.tar" s3://bucket/embeddings
        clip-index embed table.parquet embeddings/ --caption_column text
        clip-index embed photos/ embeddings/ --dry_run

    Args:
        input: a folder of pictures, tars or parquet files; a path with braces or globs in quotes; or a URL
        output: folder for the shards, local or a URL
        model: what embeds; `clip-index models` lists the names
        input_format: how the input is read
        modality: what is embedded; auto takes what the input has
        image_column: the parquet column with picture bytes or paths
        caption_column: the parquet column with captions
        devices: where the model runs, a worker each: cpu, cpu*4, cuda, cuda:0,cuda:1; auto takes every GPU
        precision: the number format that the model computes in; int8 is for CLIP on CPUs and is never auto
        decode: fast shrinks large JPEGs while it decodes them; `clip-index models --check` says what it costs
        batch_size: samples that go through the model at once; by itself 32 on a CPU, 256 on a GPU
        rows_per_shard: rows of a shard, where the input does not decide it
        max_failure_rate: stop when a larger share of the samples fails
        update: embed shards again whose input has changed
        retry_failed: embed shards again that have failed samples
        rank: the part of the work that is this process's, from 0; told by Slurm, torchrun or MPI where not given
        world: how many processes share the work; `clip-index finalize` comes after the last
        executor: local runs on this machine's devices; spark on the cluster that Spark is configured for
        dry_run: say what would be done, from a few samples, and write nothing
        json: print the plan or the summary as one JSON document
    """
    from clip_index.embed import embed
    from clip_index.embed_preview import preview
    from clip_index.embed_report import format_failures, format_preview, format_summary
    from clip_index.progress import Bar

    options = {
        "model": model,
        "input_format": input_format,
        "modality": modality,
        "image_column": image_column,
        "caption_column": caption_column,
        "devices": devices,
        "precision": precision,
        "decode": decode,
        "batch_size": batch_size,
        "rows_per_shard": rows_per_shard,
        "update": update,
        "retry_failed": retry_failed,
        "rank": rank,
        "world": world,
        "executor": executor,
    }
    if dry_run:
        plan = preview(input, output, **options)
        if json:
            print_json(asdict(plan))
        else:
            print(format_preview(plan))
        return
    summary = embed(input, output, max_failure_rate=max_failure_rate, progress=Bar, **options)
    if json:
        print_json(asdict(summary))
    else:
        print(format_summary(summary))
    if summary.failed:
        note(format_failures(summary))
    if not json and summary.world > 1:
        suggest("finalize", output)
    elif not json:
        suggest("build-index", output, beside(output, "index"))
    if summary.failed:
        raise SystemExit(front_door.FAILED_SAMPLES)


def finalize(embeddings: str, *, json: bool = False) -> None:
    """Write the manifest when all ranks of `clip-index embed` have ended.

    Lists the folders once: the exit status is 1, and they are named, if shards are missing, or files that their markers
    name, or if one has another size than its marker says. `clip-index verify` reads every byte.

    Examples:
        clip-index finalize embeddings/

    Args:
        embeddings: the folder that all ranks have embedded into
        json: print one JSON document
    """
    from clip_index import storage, store

    folder = storage.absolute(embeddings)
    manifest = store.finalize(folder, store.Manifest.load(folder))
    told = {"embeddings": folder, "rows": manifest.rows, "failed": manifest.failed, "shards": len(manifest.ids)}
    if json:
        print_json(told)
    else:
        print("{embeddings}: {rows:,} rows in {shards:,} shards, {failed:,} failed samples".format(**told))
        suggest("build-index", embeddings, "index")


def verify(embeddings: str, *, json: bool = False) -> None:
    """Check every file of a folder of embeddings against what its run recorded.

    Markers, checksums, row counts and unit norms. The exit status is 1 if anything is wrong.

    Examples:
        clip-index verify embeddings/

    Args:
        embeddings: the folder that `clip-index embed` wrote
        json: print one JSON document
    """
    from clip_index import store
    from clip_index.types import ClipIndexError
    from clip_index.verify import verify

    problems = verify(embeddings)
    if json:
        print_json({"embeddings": embeddings, "ok": not problems, "problems": problems})
    else:
        for problem in problems:
            print(problem)
    if problems:
        advice = "to embed a shard again, remove its marker in done/ and run embed"
        raise ClipIndexError(f"{embeddings}: {count(len(problems), 'problem')}; {advice}")
    if not json:
        manifest = store.Manifest.load(embeddings)
        shards, failed = count(len(manifest.ids), "shard"), count(manifest.failed, "failed sample")
        print(f"{embeddings}: ok, {count(manifest.rows, 'row')} in {shards}, {failed}")
        suggest("build-index", embeddings, beside(embeddings, "index"))


def models(*, check: str | None = None, json: bool = False) -> None:
    """List the models that `clip-index embed --model` takes, or check one.

    A check embeds sample pictures and captions in each precision that the model has here and compares them with float32
    over pictures that Pillow prepared; the exit status is 1 where the cosines are below the gates.

    Examples:
        clip-index models
        clip-index models --check mini

    Args:
        check: the model to measure
        json: print one JSON document
    """
    from clip_index.encoders import list_models
    from clip_index.render import Style, columns

    if check is not None:
        _check(check, json)
        return
    table = list_models()
    if json:
        print_json(table)
    else:
        print(columns(table, Style.of(sys.stdout)))
        suggest("embed", "photos", "embeddings", "--model", str(table[0]["name"]))


def _check(model: str, json: bool) -> None:
    from clip_index import gates
    from clip_index.render import Style, columns
    from clip_index.types import ClipIndexError

    measured = gates.check(model)
    table = [row.to_dict() for row in measured]
    if json:
        print_json(table)
    else:
        print(columns(table, Style.of(sys.stdout)))
    failed = sum(not row.passed for row in measured)
    if failed:
        raise ClipIndexError(f"{model}: {failed} of {count(len(measured), 'measurement')} below the gate")


PROGRAM = Program(
    name="clip-index",
    version=__version__,
    summary="embed pictures and captions, build a kNN index, search it with words or pictures",
    start=(
        ("clip-index demo", "search 312 pictures now, offline"),
        ("clip-index embed photos/ embeddings/", "then your own: embed them,"),
        ("clip-index build-index embeddings/ index/", "build an index,"),
        ('clip-index query "a dog"', "and search it"),
    ),
    commands={
        "demo": demo,
        "download": download,
        "embed": embed,
        "finalize": finalize,
        "build-index": build_index,
        "query": query,
        "end2end": end2end,
        "append": append,
        "delete": delete,
        "merge": merge,
        "filter": filter,
        "dedup": dedup,
        "verify": verify,
        "models": models,
        "convert": convert,
        "export": export,
    },
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line, the process's own unless one is given; returns the exit status."""
    if argv is None:
        argv = sys.argv[1:]
        if "--debug" not in argv and not sys.warnoptions:
            warnings.simplefilter("ignore")  # a library's advice to programmers is not for users
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.reconfigure(errors="backslashreplace")  # a file name need not fit the terminal's encoding
    return front_door.run(PROGRAM, argv)
