"""The `export` command: what is here in the formats of other programs, a model as ONNX, an index for other engines."""

from __future__ import annotations

import os
import shutil
from typing import Literal

from clip_index.console import count, note, print_json, suggest

_PAIRS = 48
"""Sample pairs to calibrate on, and as many others to measure on."""


def export(
    source: str,
    output: str,
    *,
    format: Literal["onnx", "parquet", "lance", "milvus", "qdrant"] | None = None,
    precision: Literal["fp32", "fp16", "int8"] | None = None,
    collection: str | None = None,
    json: bool = False,
) -> None:
    """Export a model as ONNX, or an index as parquet, Lance, Milvus or Qdrant.

    Of a model: one file a tower, with its configuration and tokenizer. `--model onnx:FOLDER` embeds with it through
    onnxruntime, `openvino:FOLDER` through OpenVINO. fp16 is for GPUs; int8 is for CPUs with VNNI or AMX, is calibrated
    on some of the sample pictures and captions, and measured on others: a model whose cosine to float32 is too low is
    not exported.

    Of an index: the rows that are not deleted, each with its number as `id`, the columns of its metadata, and a float32
    vector for each modality. Lance takes over the lists of an index of two stages: nothing is clustered again.

    Examples:
        clip-index export ViT-B-32/openai vit-b-32-onnx
        clip-index export tuned tuned-int8 --precision int8
        clip-index export index/ rows/ --format parquet
        clip-index export index/ images.lance --format lance
        clip-index export index/ images.db --format milvus
        clip-index export index/ http://localhost:6333 --format qdrant --collection images

    Args:
        source: a checkpoint or the name of one, as for `clip-index convert`; or the folder of an index
        output: a new folder, for an index also a URL; for milvus and qdrant a server's URL, or a .db file, a folder
        format: onnx is for models, which need not name it; the others are for indices
        precision: the number format of an ONNX model's matrices, fp32 where not given
        collection: what Milvus and Qdrant are to call the rows, images where not given
        json: print one JSON document
    """
    from clip_index import storage
    from clip_index.locations import is_index
    from clip_index.types import UsageError

    others = "parquet, lance, milvus or qdrant"
    if is_index(storage.absolute(source)):
        if format is None or format == "onnx":
            raise UsageError(f"{source} is an index: say what to make of it with --format {others}")
        if precision is not None:
            raise UsageError(f"--precision is for models: an index goes to {format} in float32")
        if collection is not None and format not in ("milvus", "qdrant"):
            raise UsageError(f"--collection is for milvus and qdrant, not {format}")
        _export_index(source, output, format, collection or "images", json)
        return
    if format is not None and format != "onnx":
        raise UsageError(f"--format {format} is for an index, and there is none in {source}")
    if collection is not None:
        raise UsageError("--collection is for the rows of an index in milvus and qdrant")
    _export_model(source, output, precision or "fp32", json)


def _export_index(index: str, output: str, format: str, collection: str, json: bool) -> None:
    from clip_index.exports.rows import export_rows

    told = export_rows(index, output, format, collection=collection)
    if json:
        print_json(told)
        return
    print(f"{output}: {count(told['rows'], 'row')}")
    for line in told["notes"]:
        note(f"{output}: {line}")


def _export_model(model: str, folder: str, precision: str, json: bool) -> None:
    from clip_index import gates
    from clip_index.clip.loading import absolute_name, load_model
    from clip_index.clip.onnx_export import export_towers
    from clip_index.clip.tokenizer import tokenize
    from clip_index.types import ClipIndexError, UsageError

    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UsageError(f"{folder} is there already: name a new or an empty folder")
    if model == "mini":
        raise UsageError("mini is no CLIP model, and has no ONNX form: name a checkpoint, such as ViT-B-32/openai")
    loaded, preprocess = load_model(model)
    pictures, captions = gates.sample(_PAIRS)
    pixels = [preprocess(picture)[0][None] for picture in pictures]
    length = loaded.context_length
    tokens = [tokenize(caption, length, truncate=True).numpy() for caption in captions]
    if not loaded.config.text.mixer:
        tokens = [row[:, : row.argmax() + 1] for row in tokens]
    part = f"{os.path.normpath(folder)}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        counts = export_towers(
            loaded, preprocess, part, precision, name=absolute_name(model), images=pixels, tokens=tokens
        )
        measured = gates.check(f"onnx:{part}", device="cpu", number=_PAIRS, start=1, decoding=False)
        failed = [row for row in measured if not row.passed]
        if failed:
            raise ClipIndexError(f"{model} in {precision} is too far from float32, and was not exported: {failed[0]}")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if json:
        print_json(
            {"output": folder, "format": "onnx", "precision": precision, "cosines": [row.to_dict() for row in measured]}
        )
        return
    for row in measured:
        done, matrices = counts.get(row.modality, (0, 0))
        note(f"{folder}: {row}" + (f", {done} of {matrices} matrices in int8" if matrices else ""))
    suggest("embed", "photos", "embeddings", "--model", f"onnx:{folder}")
