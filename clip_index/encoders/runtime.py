"""Where a model runs and how exactly: device, precision, threads."""

from __future__ import annotations

import torch

from clip_index.types import UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
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


def resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` is the fastest that the device has instructions for. Raises UsageError."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if device.type == "cpu":
        if precision == "fp16":
            raise UsageError("fp16 needs a CUDA device: choose bf16 or fp32 on the CPU")
        return precision if precision != "auto" else "bf16" if cpu_has_bfloat16() else "fp32"
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX512-BF16 or AMX): without, bf16 is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(probe() for probe in (getattr(torch.cpu, name, None) for name in probes) if probe)
