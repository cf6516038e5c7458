"""The `build-index` command: what it takes, and what it says."""

from __future__ import annotations

from typing import Literal

from clip_index.console import print_json, suggest


def build_index(
    embeddings: str | None = None,
    index: str | None = None,
    *,
    memory: str = "4G",
    recall_target: float = 0.99,
    modality: Literal["image", "text"] | None = None,
    model: str | None = None,
    index_key: str | None = None,
    engine: Literal["auto", "faiss", "autofaiss"] = "auto",
    plan: str | None = None,
    json: bool = False,
) -> None:
    """Build a kNN index over embeddings, tune it to a recall target and measure it.

    Below 100,000 rows every row is compared. From there on codes of one bit a dimension find candidates, and exact
    vectors on disk rank them: how far to look is chosen for image and for text queries by measurement.

    Examples:
        clip-index build-index embeddings/ index/
        clip-index build-index embeddings/ index/ --memory 500M --recall_target 0.95
        clip-index build-index from-clip-retrieval/ index/ --model ViT-B-32/openai
        clip-index build-index embeddings/ index/ --index_key HNSW32
        clip-index build-index --plan 1000000000x768 --memory 64G

    Args:
        embeddings: the folder that `clip-index embed` wrote, or one with .npy files of other programs
        index: folder for the index
        memory: what the build may take in memory, such as 500M or 4G
        recall_target: how many of the 10 nearest are to be found, compared with exact search; warn when it is less
        modality: index these vectors alone; both, if the embeddings have both
        model: the encoder of embeddings of other programs; without it their index is searched with vectors alone
        index_key: the faiss index to build, instead of the one chosen for the size
        engine: what builds it; autofaiss chooses by memory, and its index has no second stage
        plan: say what an index of so many rows and dimensions, such as 1000000x512, would take, and build nothing
        json: print the report or the plan as one JSON document
    """
    from clip_index.types import UsageError

    if plan is not None:
        if embeddings is not None:
            raise UsageError("--plan takes no embeddings: leave the folders out")
        from clip_index import plan as planning
        from clip_index.index import parse_memory

        planned = planning.plan(*planning.parse_size(plan), parse_memory(memory))
        if json:
            print_json(planned)
        else:
            print(planning.format_plan(planned))
        return
    if embeddings is None or index is None:
        raise UsageError("build-index: name the folder of embeddings and one for the index")
    from clip_index.index import build_index
    from clip_index.report import format_report

    options = {"index_key": index_key, "engine": engine, "modality": modality, "model": model}
    report = build_index(embeddings, index, memory=memory, recall_target=recall_target, **options)
    if json:
        print_json(report)
    else:
        print(format_report(report))
        suggest("query", "a dog", "--index", index)
