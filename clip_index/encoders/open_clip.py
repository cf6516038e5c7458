"""Any model of the library open_clip.

`open_clip:ARCHITECTURE/WEIGHTS`, where WEIGHTS is a published tag or a file; `open_clip:FOLDER` with an
`open_clip_config.json`; or `open_clip:hf-hub:REPOSITORY`.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from typing import Any

from torch import Tensor

from clip_index.clip.loading import hash_tensors
from clip_index.encoders.library import LibraryEncoder, import_library, one_line, remove
from clip_index.encoders.runtime import resolve_device
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> LibraryEncoder:
    """The encoder of a model of open_clip.

    Raises UsageError for a name that it does not have, ClipIndexError where the library or the model does not load.
    """
    library = import_library("open_clip", "open_clip")
    where = resolve_device(device)
    source, weights, quick_gelu = _locate(library, name.partition(":")[2])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.create_model(source, weights, require_pretrained=True, force_quick_gelu=quick_gelu)
            tokenizer = library.get_tokenizer(source)
    except Exception as error:  # a name, a file, a network: the library and its own libraries raise anything
        raise ClipIndexError(f"cannot load {name}: {one_line(error)}") from error
    fingerprint = hash_tensors(json.dumps([source if weights else "", quick_gelu]), model.state_dict())
    told = library.get_model_preprocess_cfg(model)
    sizes = {told["size"]} if isinstance(told["size"], int) else set(told["size"])
    if len(sizes) > 1:
        raise ClipIndexError(f"{name} takes pictures of {told['size']}, and only squares are prepared")
    same = {key: told[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    preprocess = Preprocess(size=sizes.pop(), fill=told["fill_color"], **same)
    if "image" not in towers:
        remove(model, ["visual"])
    if "text" not in towers:
        # in some architectures the parts of the text tower are the model's own
        parts = [*model._modules, *(name for name in model._parameters if not name.startswith("logit"))]
        remove(model, set(parts) - {"visual"})
    model.eval().requires_grad_(False).to(where)

    def encode_texts(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(where))

    return LibraryEncoder(
        model.encode_image,
        encode_texts,
        preprocess,
        towers=towers,
        name=f"open_clip:{source.removeprefix('local-dir:')}{'/' if weights else ''}{weights or ''}",
        fingerprint=fingerprint,
        device=where,
        precision=precision,
    )


def _locate(library: Any, rest: str) -> tuple[str, str | None, bool]:
    """(what open_clip calls the model, the weights, whether they need QuickGELU)."""
    if os.path.isdir(os.path.expanduser(rest)):
        return f"local-dir:{os.path.abspath(os.path.expanduser(rest))}", None, False
    if rest.startswith("hf-hub:"):
        return rest, None, False
    arch, _, weights = rest.partition("/")
    if arch not in library.list_models():
        near = difflib.get_close_matches(arch, library.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "python -c 'import open_clip; print(open_clip.list_models())'"
        raise UsageError(f"open_clip has no architecture {arch!r}: {hint}")
    if os.path.isfile(os.path.expanduser(weights)):
        return arch, os.path.abspath(os.path.expanduser(weights)), False
    tags = library.list_pretrained_tags_by_model(arch)
    if weights not in tags:
        raise UsageError(
            f"open_clip has no weights {weights!r} of {arch}: choose a file or {', '.join(tags) or 'nothing'}"
        )
    # Some tags need QuickGELU under an architecture's plain name, and open_clip only warns of it.
    return arch, weights, bool(library.get_pretrained_cfg(arch, weights).get("quick_gelu"))
