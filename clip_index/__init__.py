"""clip-index: embed images and captions, build a kNN index over them, search it with words or pictures.

    from clip_index import Searcher
    from clip_index.embed import embed

The names below are imported when they are first used: `import clip_index` itself loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_index._version import __version__

if TYPE_CHECKING:
    from clip_index.encoders import load_encoder
    from clip_index.index import build_index
    from clip_index.search import Searcher

__all__ = ["Searcher", "__version__", "build_index", "load_encoder"]

_HOMES = {"Searcher": "search", "build_index": "index", "load_encoder": "encoders"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
