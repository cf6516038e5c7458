"""How far a faster way to embed may be from the exact one, and how far it is on the sample pictures.

Exact is float32 over pictures that Pillow decodes and resizes. Nothing of the package's own decoding is used for it, so
that a fault there shows too.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_index.sample_pairs import sample
from clip_index.types import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip_index.preprocess import Preprocess

CAMERA_PIXELS = 1024
"""The long side of the JPEGs that the sample pictures are made into: those of cameras, which `fast` is for."""


@dataclass(frozen=True)
class Gate:
    """The least cosine to the exact vectors that is good enough: of the mean, or of the worst."""

    statistic: str
    least: float


EXACT, FAST, INT8 = Gate("min", 0.9999), Gate("mean", 0.999), Gate("mean", 0.99)
GATES = {"fp32": EXACT, "bf16": FAST, "fp16": FAST, "int8": INT8}


@dataclass(frozen=True)
class Measured:
    """Cosines of one preset's vectors to the exact ones, and the gate that they have to pass."""

    preset: str
    modality: str
    mean: float
    min: float
    gate: Gate

    def to_dict(self) -> dict[str, Any]:
        """A row of a table."""
        gate = f"{self.gate.statistic} >= {self.gate.least:g}"
        cosines = {"mean": round(self.mean, 6), "min": round(self.min, 6)}
        return {"preset": self.preset, "modality": self.modality, **cosines, "gate": gate, "passed": self.passed}

    def __str__(self) -> str:
        gate = f"{self.gate.statistic} {self.gate.least:g}"
        return f"{self.preset} {self.modality}: cosine mean {self.mean:.5f}, min {self.min:.5f} (gate: {gate})"

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through; what is not a number does not pass."""
        return getattr(self, self.gate.statistic) >= self.gate.least


def measure(preset: str, modality: str, vectors: np.ndarray, exact: np.ndarray, gate: Gate) -> Measured:
    """Compare unit rows, float32 [n, d]."""
    cosines = np.einsum("nd,nd->n", vectors, exact)
    return Measured(preset, modality, float(cosines.mean()), float(cosines.min()), gate)


def camera_jpeg(data: bytes) -> bytes:
    """A picture scaled up to a JPEG of `CAMERA_PIXELS`."""
    from PIL import Image

    picture = _open(data)
    ratio = CAMERA_PIXELS / max(picture.size)
    large = picture.resize([max(1, round(side * ratio)) for side in picture.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def exact_pixels(preprocess: Preprocess, data: bytes) -> np.ndarray:
    """uint8 [size, size, 3] by Pillow alone."""
    from PIL import Image

    picture = _open(data)
    width, height = preprocess.resized(*picture.size)
    # Pass by pass, as Pillow did until 13, which begins with the axis that is cheaper: it clips in between.
    for size in ((width, picture.height), (width, height)):
        picture = picture.resize(size, Image.Resampling[preprocess.interpolation.upper()])
    square = Image.new("RGB", (preprocess.size, preprocess.size), (preprocess.fill,) * 3)
    halve = round if preprocess.crop_offset == "round" else math.floor
    spare = [side - preprocess.size for side in picture.size]
    square.paste(picture, tuple(-halve(n / 2) if n > 0 else -n // 2 for n in spare))
    return np.asarray(square)


def _open(data: bytes) -> Image:
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def check(
    model: str, *, device: str = "auto", number: int = 64, start: int = 0, decoding: bool = True
) -> list[Measured]:
    """Measure every precision that a model can have on a device, and scaled `decoding`, on `number` sample pairs.

    An exported model is compared with the one that it was exported from. Raises UsageError for an unknown model.
    """
    from clip_index.encoders import load_encoder, precisions

    source, choices = precisions(model, device)
    data, captions = sample(number, start)
    exact = load_encoder(source, device=device, precision="fp32")
    prepare = exact.preprocess
    wanted = exact.encode_image(np.stack([exact_pixels(prepare, picture) for picture in data]))
    texts = exact.encode_text(captions)
    pixels = np.stack([prepare(picture)[0] for picture in data])
    found = []
    for precision in choices:
        try:
            same = (model, precision) == (source, "fp32")
            encoder = exact if same else load_encoder(model, device=device, precision=precision)
        except UsageError:  # some architectures have no int8
            continue
        gate = GATES[precision]
        found.append(measure(precision, "image", encoder.encode_image(pixels), wanted, gate))
        found.append(measure(precision, "text", encoder.encode_text(captions), texts, gate))
    if decoding:
        fast = replace(prepare, preset="fast")
        jpegs = [camera_jpeg(picture) for picture in data]
        wanted = exact.encode_image(np.stack([exact_pixels(prepare, picture) for picture in jpegs]))
        vectors = exact.encode_image(np.stack([fast(picture)[0] for picture in jpegs]))
        found.append(measure("fp32, fast decoding", "image", vectors, wanted, FAST))
    return found
