"""The `export` command: a CLIP checkpoint to ONNX, one file a tower, measured before it is handed over."""

from __future__ import annotations

import os
import shutil
from typing import Literal

from clip_index.console import note, suggest

_PAIRS = 48
"""Sample pairs to calibrate on, and as many others to measure on."""


def export(model: str, folder: str, *, precision: Literal["fp32", "fp16", "int8"] = "fp32") -> None:
    """Export a CLIP model to ONNX, one file a tower, with its configuration and tokenizer.

    `--model onnx:FOLDER` embeds with it through onnxruntime, `openvino:FOLDER` through OpenVINO. fp16 is for GPUs; int8
    is for CPUs with VNNI or AMX, is calibrated on some of the sample pictures and captions, and measured on others: a
    model whose cosine to float32 is too low is not exported.

    Examples:
        clip-index export ViT-B-32/openai vit-b-32-onnx
        clip-index export tuned tuned-int8 --precision int8

    Args:
        model: a checkpoint or the name of one, as for `clip-index convert`
        folder: folder to write
        precision: the number format of the matrices
    """
    from clip_index import gates
    from clip_index.clip.loading import absolute_name, load_model
    from clip_index.clip.onnx_export import export_towers
    from clip_index.clip.tokenizer import tokenize
    from clip_index.types import ClipIndexError, UsageError

    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UsageError(f"{folder} is there already: name a new or an empty folder")
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
    for row in measured:
        done, matrices = counts.get(row.modality, (0, 0))
        note(f"{folder}: {row}" + (f", {done} of {matrices} matrices in int8" if matrices else ""))
    suggest("embed", "photos", "embeddings", "--model", f"onnx:{folder}")
