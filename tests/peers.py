"""The libraries that the native model is compared with in tests, made importable."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch


@functools.cache
def open_clip() -> Any:
    """open_clip, beside a CPU build of torch.

    torchvision's wheel is linked against CUDA: beside a CPU build its operators do not load, and registering their
    fake versions fails. No test needs those operators, so the registration is left out.
    """
    register_fake = torch.library.register_fake

    def skip_torchvision(name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register_fake(name, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import open_clip
    finally:
        torch.library.register_fake = register_fake
    return open_clip


@functools.cache
def transformers() -> Any:
    """transformers, which fails on a torchvision that does not load: torchvision is made importable before it."""
    open_clip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        import transformers.models.clip.modeling_clip
    return transformers
