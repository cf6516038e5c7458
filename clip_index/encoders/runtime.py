"""Where a model runs and how exactly: device, precision, threads."""

from __future__ import annotations

import torch

from clip_index.clip.int8 import can_int8
from clip_index.types import UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """The device that a name means; `auto` is the first CUDA device, else the CPU. Raises UsageError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no such device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def resolve_precision(precision: str, device: torch.device, *, int8: bool = False) -> str:
    """A precision, `auto` being the fastest in 16 or 32 bits that the device has instructions for. Raises UsageError.

    `int8` says whether the model can be had in it.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if precision == "int8" and not int8:
        raise UsageError("this model has no int8: choose bf16 or fp32")
    if device.type == "cpu":
        if precision == "fp16":
            raise UsageError("fp16 needs a CUDA device: choose bf16 or fp32 on the CPU")
        if precision == "int8" and not can_int8():
            raise UsageError("int8 needs a CPU with VNNI or AMX, and torch with oneDNN: choose bf16 or fp32")
        return precision if precision != "auto" else float_precision(device)
    if precision == "int8":
        raise UsageError("int8 is for CPUs: choose bf16 or fp16 on a CUDA device")
    return precision if precision != "auto" else float_precision(device)


def float_precision(device: torch.device) -> str:
    """The fastest of `fp32`, `bf16` and `fp16` that the device has instructions for."""
    if device.type == "cpu":
        return "bf16" if cpu_has_bfloat16() else "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX512-BF16 or AMX): without, bf16 is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(probe() for probe in (getattr(torch.cpu, name, None) for name in probes) if probe)
