"""The published weights by name, and where their files are: a folder of the user's, else Hugging Face's hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from clip_index.clip.config import ARCHITECTURES, split_activation
from clip_index.locations import cache_folder
from clip_index.types import ClipIndexError, UsageError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

OPENAI_NAMES = {
    "RN50": "RN50/openai",
    "RN101": "RN101/openai",
    "RN50x4": "RN50x4/openai",
    "RN50x16": "RN50x16/openai",
    "RN50x64": "RN50x64/openai",
    "ViT-B/32": "ViT-B-32/openai",
    "ViT-B/16": "ViT-B-16/openai",
    "ViT-L/14": "ViT-L-14/openai",
    "ViT-L/14@336px": "ViT-L-14-336/openai",
}
"""What `available_models` of OpenAI's package answers, and the same weights by our names."""


MILLION_PARAMETERS = {
    "RN50": 102,
    "RN101": 120,
    "RN50x4": 178,
    "RN50x16": 291,
    "RN50x64": 623,
    "ViT-B-32": 151,
    "ViT-B-32-256": 151,
    "ViT-B-16": 150,
    "ViT-B-16-plus-240": 208,
    "ViT-L-14": 428,
    "ViT-L-14-336": 428,
    "ViT-H-14": 986,
    "ViT-H-14-378": 987,
    "ViT-g-14": 1367,
    "ViT-bigG-14": 2540,
}
"""Of both towers, for saying what a download costs without building the model."""


@dataclass(frozen=True)
class Weights:
    """One published checkpoint: how it was trained is fixed here, for its files do not say."""

    name: str
    repository: str
    licence: str
    activation: str = "gelu"
    preprocess: dict[str, Any] = field(default_factory=dict)
    """What differs from OpenAI's preprocessing, as fields of `clip_index.preprocess.Preprocess`."""

    @property
    def architecture(self) -> str:
        return self.name.split("/")[0]


_INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_SQUASH = {"resize_mode": "squash"}
_MIT, _META, _APPLE = "MIT", "CC-BY-NC-4.0", "Apple Sample Code License"


def _table() -> Iterator[Weights]:
    timm = {"B-32": "base_patch32_clip_224", "B-16": "base_patch16_clip_224", "L-14": "large_patch14_clip_224"}
    timm |= {"L-14-336": "large_patch14_clip_336", "B-16-plus-240": "base_patch16_plus_clip_240"}
    timm |= {"H-14": "huge_patch14_clip_224", "bigG-14": "gigantic_patch14_clip_224"}
    # OpenAI, and what the first releases of open_clip trained; activation as in open_clip's pretrained.py.
    for size in ("B-32", "B-16", "L-14", "L-14-336"):
        yield Weights(f"ViT-{size}/openai", f"timm/vit_{timm[size]}.openai", _MIT, "quickgelu")
    for arch in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"):
        yield Weights(f"{arch}/openai", f"timm/{arch.replace('RN', 'resnet')}_clip.openai", _MIT, "quickgelu")
    for arch, tag in (("RN50", "yfcc15m"), ("RN50", "cc12m"), ("RN101", "yfcc15m")):
        yield Weights(f"{arch}/{tag}", f"timm/{arch.replace('RN', 'resnet')}_clip.{tag}", _MIT, "quickgelu")
    for size, activation in (("B-32", "quickgelu"), ("B-16", "gelu"), ("B-16-plus-240", "gelu"), ("L-14", "gelu")):
        for tag in ("laion400m_e31", "laion400m_e32"):
            # The hub has one of the two at 240 pixels.
            if (size, tag) != ("B-16-plus-240", "laion400m_e32"):
                yield Weights(f"ViT-{size}/{tag}", f"timm/vit_{timm[size]}.{tag}", _MIT, activation)
    yield Weights("ViT-B-32/laion2b_e16", f"timm/vit_{timm['B-32']}.laion2b_e16", _MIT)
    # LAION's own repositories.
    for size, tag, repository, preprocess in (
        ("B-32", "laion2b_s34b_b79k", "B-32-laion2B-s34B-b79K", {}),
        ("B-32", "datacomp_xl_s13b_b90k", "B-32-DataComp.XL-s13B-b90K", {}),
        ("B-32", "datacomp_m_s128m_b4k", "B-32-DataComp.M-s128M-b4K", {}),
        ("B-32-256", "datacomp_s34b_b86k", "B-32-256x256-DataComp-s34B-b86K", {}),
        ("B-16", "laion2b_s34b_b88k", "B-16-laion2B-s34B-b88K", {}),
        ("B-16", "datacomp_xl_s13b_b90k", "B-16-DataComp.XL-s13B-b90K", {}),
        ("B-16", "datacomp_l_s1b_b8k", "B-16-DataComp.L-s1B-b8K", {}),
        ("L-14", "laion2b_s32b_b82k", "L-14-laion2B-s32B-b82K", _INCEPTION),
        ("L-14", "datacomp_xl_s13b_b90k", "L-14-DataComp.XL-s13B-b90K", {}),
        ("L-14", "commonpool_xl_s13b_b90k", "L-14-CommonPool.XL-s13B-b90K", {}),
        ("L-14", "commonpool_xl_clip_s13b_b90k", "L-14-CommonPool.XL.clip-s13B-b90K", {}),
        ("L-14", "commonpool_xl_laion_s13b_b90k", "L-14-CommonPool.XL.laion-s13B-b90K", {}),
        ("H-14", "laion2b_s32b_b79k", "H-14-laion2B-s32B-b79K", {}),
        ("g-14", "laion2b_s12b_b42k", "g-14-laion2B-s12B-b42K", {}),
        ("g-14", "laion2b_s34b_b88k", "g-14-laion2B-s34B-b88K", {}),
        ("bigG-14", "laion2b_s39b_b160k", "bigG-14-laion2B-39B-b160k", {}),
    ):
        yield Weights(f"ViT-{size}/{tag}", f"laion/CLIP-ViT-{repository}", _MIT, preprocess=preprocess)
    for size in ("B-32", "B-16", "L-14"):
        yield Weights(f"ViT-{size}/metaclip_400m", f"timm/vit_{timm[size]}.metaclip_400m", _META, "quickgelu")
    for size in ("B-32", "B-16", "L-14", "H-14", "bigG-14"):
        yield Weights(f"ViT-{size}/metaclip_fullcc", f"timm/vit_{timm[size]}.metaclip_2pt5b", _META, "quickgelu")
    yield Weights("ViT-H-14/metaclip_altogether", f"timm/vit_{timm['H-14']}.metaclip_altogether", _META)
    yield Weights("ViT-B-16/dfn2b", "apple/DFN2B-CLIP-ViT-B-16", _APPLE, "quickgelu")
    yield Weights("ViT-L-14/dfn2b", "apple/DFN2B-CLIP-ViT-L-14", _APPLE, "quickgelu")
    yield Weights("ViT-L-14/dfn2b_s39b", "apple/DFN2B-CLIP-ViT-L-14-39B", _APPLE)
    yield Weights("ViT-H-14/dfn5b", "apple/DFN5B-CLIP-ViT-H-14", _APPLE, "quickgelu", _SQUASH)
    yield Weights("ViT-H-14-378/dfn5b", "apple/DFN5B-CLIP-ViT-H-14-378", _APPLE, "quickgelu", _SQUASH)


WEIGHTS = {weights.name: weights for weights in _table()}


def find(name: str) -> Weights:
    """The published weights of a name: `ViT-B-32/laion2b_s34b_b79k`, or one of OpenAI's such as `ViT-B/32`.

    `ViT-B-32-quickgelu/openai` states the activation, and UsageError says so if the weights were trained with another.
    An unknown name is a UsageError that gives the nearest.
    """
    name = OPENAI_NAMES.get(name, name)
    arch, _, tag = name.partition("/")
    base, activation = split_activation(arch)
    weights = WEIGHTS.get(f"{base}/{tag}")
    if weights is None:
        raise UsageError(f"unknown model {name!r}: {_nearest(base, tag)}")
    if activation not in (None, weights.activation):
        raise UsageError(f"{weights.name} was trained with {weights.activation}, not {activation}: name it without")
    return weights


def _nearest(arch: str, tag: str) -> str:
    tags = [name.split("/")[1] for name in WEIGHTS if name.startswith(f"{arch}/")]
    if tags and not get_close_matches(tag, tags, n=1):
        return f"{arch} has {', '.join(tags)}"
    near = get_close_matches(f"{arch}/{tag}", [*WEIGHTS, *OPENAI_NAMES], n=1, cutoff=0.4)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join([*OPENAI_NAMES][:3])}, ... (`clip-index models` lists all), or give a path"


def weights_file(weights: Weights, folder: str | os.PathLike[str] | None = None) -> str:
    """A local file with the weights: from `folder`, the cache of this package, or the hub's, which fetches it once.

    Raises ClipIndexError where the file is not here and cannot be fetched: one line says what to put where.
    """
    stem = os.path.join(cache_folder(), "models", *weights.name.split("/"))
    stems = [stem] if folder is None else [os.path.join(folder, *weights.name.split("/")), stem]
    if weights.name.endswith("/openai"):
        # Where OpenAI's package keeps its downloads, under their own names.
        file = "ViT-L-14-336px" if weights.architecture == "ViT-L-14-336" else weights.architecture
        stems.append(os.path.join(folder or os.path.expanduser("~/.cache/clip"), file))
    for place in stems:
        for suffix in SUFFIXES:
            if os.path.isfile(place + suffix):
                return place + suffix
    return _fetch(weights, f"{stems[0]}.safetensors")


def _fetch(weights: Weights, place: str) -> str:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    # What is in the hub's cache needs no network, and stays the same until someone removes it.
    for file in HUB_FILES:
        if isinstance(found := hub.try_to_load_from_cache(weights.repository, file), str):
            return found
    problem: Exception | None = None
    try:
        for file in HUB_FILES:
            try:
                # Asked first, because a download without a network tries again for half a minute.
                hub.get_hf_file_metadata(hub.hf_hub_url(weights.repository, file), timeout=10)
            except EntryNotFoundError as error:
                problem = error
            else:
                return hub.hf_hub_download(weights.repository, file)
    # Whatever stands between here and the file (no network, no permission, no room), the way out is the same.
    except Exception as error:
        problem = error
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    raise ClipIndexError(
        f"cannot fetch {weights.name} ({reason}): download {HUB_FILES[0]} of the Hugging Face repository "
        f"{weights.repository} where there is a network and put it at {place}"
    ) from problem


def is_architecture(name: str) -> bool:
    """Whether a name is one of `config.ARCHITECTURES`, with or without an activation."""
    return split_activation(name)[0] in ARCHITECTURES
