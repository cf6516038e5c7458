"""clip-index: embed images and captions, build a kNN index over them, search it with words or pictures."""

from clip_index._version import __version__

__all__ = ["__version__"]
