"""Exported towers as encoders: `onnx:FOLDER` through onnxruntime, `openvino:FOLDER` through OpenVINO on a CPU.

FOLDER is what `clip-index export` wrote. Its precision was chosen there.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clip_index.clip.onnx_export import CONFIG_FILE, VERSION
from clip_index.clip.tokenizer import tokenize
from clip_index.encoders.batches import Batches
from clip_index.encoders.clip import groups_of_similar_length
from clip_index.encoders.library import check_images
from clip_index.encoders.runtime import resolve_device
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

_PATCHES = 50
"""Positions that are assumed of a picture, for the size of the blocks: those of ViT-B/32."""
_STEP = 4

Tower = Callable[[np.ndarray], np.ndarray]


class OnnxEncoder:
    """An `Encoder` over towers that take numpy arrays. One that was not loaded raises AttributeError when used."""

    def __init__(self, told: dict[str, Any], towers: dict[str, Tower], *, name: str, device: torch.device):
        self.name, self.fingerprint, self.precision = name, told["fingerprint"], told["precision"]
        self.preprocess, self.dim = Preprocess.from_describe(told["preprocess"]), told["dim"]
        self._context_length, self._whole = told["context_length"], told["whole_texts"]
        self._batches = Batches(device)
        for modality, tower in towers.items():
            setattr(self, f"_{modality}", lambda block, tower=tower: torch.from_numpy(tower(block)))

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] to float32 [n, dim], unit rows."""
        check_images(images, self.preprocess.size)
        if not len(images):
            return np.empty((0, self.dim), np.float32)
        return self._batches.run(self._image, images, _PATCHES)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at the model's context length, to float32 [n, dim], unit rows."""
        tokens = tokenize(texts, self._context_length, truncate=True).numpy()
        vectors = np.empty((len(texts), self.dim), np.float32)
        lengths = tokens.argmax(axis=1) + 1  # the end token has the highest id
        for rows in groups_of_similar_length(lengths, self._context_length if self._whole else _STEP):
            longest = self._context_length if self._whole else lengths[rows].max()
            vectors[rows] = self._batches.run(self._text, tokens[rows, :longest], longest)
        return vectors


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> OnnxEncoder:
    """The encoder of an exported folder.

    Raises UsageError for another folder or a precision that it was not exported in, ClipIndexError without the library.
    """
    prefix, _, folder = name.partition(":")
    folder = os.path.abspath(os.path.expanduser(folder))
    told = read_config(folder)
    if precision not in ("auto", told["precision"]):
        raise UsageError(f"{folder} was exported in {told['precision']}, not {precision}: export it again")
    open_tower, where = (_onnxruntime if prefix == "onnx" else _openvino)(device)
    opened = {modality: open_tower(os.path.join(folder, f"{modality}.onnx")) for modality in towers}
    return OnnxEncoder(told, opened, name=f"{prefix}:{folder}", device=where)


def read_config(folder: str) -> dict[str, Any]:
    """What an exported folder says of itself. Raises UsageError where it is none, or of another version."""
    place = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(place):
        raise UsageError(f"no exported model in {folder}, as there is no {CONFIG_FILE}: clip-index export MODEL FOLDER")
    with open(place, encoding="utf-8") as file:
        told = json.load(file)
    if told.get("version") != VERSION:
        raise UsageError(f"{folder} was exported in version {told.get('version')}, this is {VERSION}: export it again")
    return told


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ClipIndexError(f"this model needs the library {module}: pip install 'clip-index[{extra}]'") from error


def _onnxruntime(device: str) -> tuple[Callable[[str], Tower], torch.device]:
    library = _import("onnxruntime", "onnx")
    on_gpu = "CUDAExecutionProvider" in library.get_available_providers()
    where = resolve_device(device if on_gpu or device != "auto" else "cpu")
    if where.type == "cuda" and not on_gpu:
        raise ClipIndexError("this onnxruntime has no CUDA: pip uninstall onnxruntime, then install onnxruntime-gpu")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if where.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": where.index or 0}))

    def open_tower(path: str) -> Tower:
        session = library.InferenceSession(path, options, providers=providers)
        feed = session.get_inputs()[0].name
        return lambda block: session.run(None, {feed: block})[0]

    return open_tower, where


def _openvino(device: str) -> tuple[Callable[[str], Tower], torch.device]:
    library = _import("openvino", "openvino")
    where = resolve_device("cpu" if device == "auto" else device)
    if where.type != "cpu":
        raise UsageError("OpenVINO runs on the CPU here: take onnx: for a CUDA device")
    # Exactly what was exported: on some CPUs it would turn float32 into bfloat16 by itself.
    # As many callers at once as torch's number of threads leaves room for.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    streams = max(1, available // torch.get_num_threads())
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams}

    def open_tower(path: str) -> Tower:
        model = library.Core().compile_model(path, "CPU", settings)
        requests = threading.local()  # a request serves one thread

        def run(block: np.ndarray) -> np.ndarray:
            if not hasattr(requests, "mine"):
                requests.mine = model.create_infer_request()
            return requests.mine.infer([block])[0].copy()

        return run

    return open_tower, where
