"""The `end2end` command: from a list of URLs, or pictures, to an index that answers.

1. A list is downloaded into OUTPUT/images; pictures and tars are taken where they are.
2. They are embedded into OUTPUT/embeddings.
3. OUTPUT/index is built over those, unless it is theirs already.
4. The query is answered, or the command that would is named.

Each step keeps what an earlier run finished.
"""

from __future__ import annotations

import json as json_module
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from clip_index import front_door
from clip_index.command import with_options
from clip_index.console import count, note, print_json, suggest
from clip_index.download import watch_download
from clip_index.download_options import DownloadOptions
from clip_index.query import show

if TYPE_CHECKING:
    from clip_index.types import Hit

_MARKER = "end2end.json"
"""What the index was built from, so that the same is not built again."""


@with_options(DownloadOptions)
def end2end(
    urls_or_folder: str,
    output: str,
    *,
    options: DownloadOptions,
    query: str | None = None,
    model: str = "mini",
    modality: Literal["auto", "image", "text", "image,text"] = "auto",
    devices: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto",
    decode: Literal["exact", "fast"] = "exact",
    batch_size: int | None = None,
    max_failure_rate: float = 0.5,
    update: bool = False,
    memory: str = "4G",
    recall_target: float = 0.99,
    index_key: str | None = None,
    json: bool = False,
) -> None:
    """Download, embed and index in one go.

    Makes images/ (of a list of URLs), embeddings/ and index/ in the output folder. Run again, each step keeps what is
    finished, and says so. The flags from --input_format on are those of `clip-index download`.

    Examples:
        clip-index end2end urls.csv output/
        clip-index end2end urls.parquet output/ --url_col URL --caption_col TEXT --query "a dog"
        clip-index end2end photos/ output/ --model ViT-B-32/laion2b_s34b_b79k

    Args:
        urls_or_folder: a list of URLs as `clip-index download` takes it, or pictures, tars or tables of them
        output: folder for everything that is made
        query: what to search for in the end
        model: what embeds; `clip-index models` lists the names
        modality: what is embedded; auto takes what the input has
        devices: where the model runs, a worker each: cpu, cpu*4, cuda, cuda:0,cuda:1; auto takes every GPU
        precision: the number format that the model computes in; int8 is for CLIP on CPUs and is never auto
        decode: fast shrinks large JPEGs while it decodes them; `clip-index models --check` says what it costs
        batch_size: samples that go through the model at once; by itself 32 on a CPU, 256 on a GPU
        max_failure_rate: stop when a larger share of the downloaded pictures cannot be embedded
        update: embed shards again whose input has changed
        memory: what building the index may take in memory, such as 500M or 4G
        recall_target: how many of the 10 nearest are to be found, compared with exact search
        index_key: the faiss index to build, instead of the one chosen for the size
        json: print one JSON document
    """
    from clip_index import storage
    from clip_index.download_report import format_summary as format_download
    from clip_index.embed import embed
    from clip_index.embed_report import format_failures, format_summary
    from clip_index.progress import Bar

    typed, output = output, storage.absolute(output)
    images, embeddings, index = (storage.join(output, name) for name in ("images", "embeddings", "index"))
    downloaded = watch_download(urls_or_folder, images, options) if _is_list(urls_or_folder, options) else None
    if downloaded is not None:
        _say(json, format_download(downloaded))
    embedded = embed(
        urls_or_folder if downloaded is None else images,
        embeddings,
        model=model,
        modality=modality,
        devices=devices,
        precision=precision,
        decode=decode,
        batch_size=batch_size,
        max_failure_rate=max_failure_rate,
        update=update,
        progress=Bar,
    )
    _say(json, format_summary(embedded))
    if embedded.failed:
        note(format_failures(embedded))
    report, kept = _index(output, embeddings, index, memory=memory, recall_target=recall_target, index_key=index_key)
    _say(json, _format_index(report, kept))
    hits = None if query is None else _search(query, index)
    if json:
        print_json(
            {
                "download": downloaded and asdict(downloaded),
                "embed": asdict(embedded),
                "index": {**report, "kept": kept},
                "hits": hits and [{"rank": rank, **hit.to_dict()} for rank, hit in enumerate(hits, 1)],
            }
        )
    elif hits is None:
        suggest("query", "a dog", "--index", storage.join(typed, "index"))
    else:
        show(hits)
    if embedded.failed:
        raise SystemExit(front_door.FAILED_SAMPLES)


def _say(json: bool, text: str) -> None:
    if not json:
        print(text, flush=True)


def _is_list(source: str, options: DownloadOptions) -> bool:
    """Whether there is something to download. Raises UsageError for flags of a download where there is not."""
    from clip_index import url_lists
    from clip_index.types import UsageError

    if url_lists.is_list(source) or options.input_format != "auto" or options.url_col is not None:
        return True
    given = [name for name, value in asdict(options).items() if value != getattr(DownloadOptions, name)]
    if given:
        raise UsageError(f"--{given[0]} is for a list of URLs, and {source} is none")
    return False


def _index(output: str, embeddings: str, index: str, **options: Any) -> tuple[dict[str, Any], bool]:
    """(the report of an index over these embeddings, whether an earlier run built it)."""
    from clip_index import storage
    from clip_index.index import build_index
    from clip_index.index_folder import IndexFolder
    from clip_index.store import Manifest
    from clip_index.types import ClipIndexError

    marker = storage.join(output, _MARKER)
    made_of = {"embeddings": Manifest.load(embeddings).digest, **options}
    with suppress(OSError, ValueError, ClipIndexError):
        if json_module.loads(storage.read_bytes(marker)) == made_of:
            folder = IndexFolder(index)
            files = {name: folder.find(name) for name in folder.marker.files}
            return json_module.loads(storage.read_bytes(files["report.json"])), True
    report = build_index(embeddings, index, **options)
    storage.write_bytes(marker, json_module.dumps(made_of, indent=1).encode())
    return report, False


def _format_index(report: dict[str, Any], kept: bool) -> str:
    from clip_index.report import format_report

    return (
        f"{report['index']}: {count(report['rows'], 'row')}, kept from an earlier run"
        if kept
        else format_report(report)
    )


def _search(text: str, index: str) -> list[Hit]:
    from clip_index.search import Searcher

    return Searcher(index).search(text, k=10)
