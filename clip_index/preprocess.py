"""Image bytes to pixels at the model's resolution.

1. Decode (`clip_index.decode`).
2. Resize with an antialiased filter: what torchvision does to a Pillow picture, to within two levels of 255.
3. Apply the EXIF orientation, crop or pad to a square.

A call runs on the thread that makes it and holds the GIL for little of its time, so a pool of threads, one a core, is
the way to run many. Mean and standard deviation are carried, not applied: the encoder folds them into its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil, floor
from typing import Any

import numpy as np
from PIL import Image

from clip_index.decode import MAX_PIXELS, Decoded, decode, decode_image, upright
from clip_index.types import ClipIndexError, UsageError

VERSION = 1
"""Raised when the same settings come to give other pixels."""

_CHOICES = {
    "resize_mode": ("shortest", "squash", "longest"),
    "interpolation": ("bicubic", "bilinear", "lanczos"),
    "crop_offset": ("round", "floor"),
    "preset": ("exact", "fast"),
}
_WIDEST = 16
"""How many times the area of the result a resized picture may have before only the part that is kept is made."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How one model wants its pictures. Call it with a file's bytes.

    resize_mode: `shortest` scales the short side to `size` and crops the centre, `squash` ignores the aspect ratio,
        `longest` scales the long side to `size` and pads with the grey level `fill`.
    crop_offset: an odd number of spare pixels is halved as torchvision does (`round`) or as Hugging Face (`floor`).
    preset: `fast` lets libjpeg-turbo halve a large JPEG up to three times while it decodes.
    mean, std: per channel, for values from 0 to 1.
    """

    size: int = 224
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crop_offset: str = "round"
    fill: int = 0
    preset: str = "exact"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, low, high in (("size", 1, 4096), ("fill", 0, 255), ("max_pixels", 1, MAX_PIXELS)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}: choose {low} to {high}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UsageError(f"{name} is {getattr(self, name)}: give three numbers, red, green, blue")
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))

    def __call__(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """(uint8 [size, size, 3], (width, height) of the whole picture, upright). Raises SampleError."""
        needed = self.resized if self.preset == "fast" else None
        decoded = decode(data, self.max_pixels, needed)
        return self._square(decoded), (decoded.width, decoded.height)

    def from_image(self, image: Image.Image) -> np.ndarray:
        """uint8 [size, size, 3] of an opened picture: what its file would give."""
        return self._square(decode_image(image))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture is scaled to, before the crop or the padding; a turned one gives it turned."""
        size = self.size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "longest":
            ratio = max(width, height) / size
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return size, int(size * height / width)
        return int(size * width / height), size

    def describe(self) -> dict[str, Any]:
        """What decides the pixels, JSON-serialisable; without `max_pixels`, which decides what is refused."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "max_pixels"}
        return {"version": VERSION, **told, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_describe(cls, told: dict[str, Any]) -> Preprocess:
        """The Preprocess that described itself so. Raises ClipIndexError where this version cannot do the same."""
        settings = {name: value for name, value in told.items() if name != "version"}
        unknown = settings.keys() - {field.name for field in fields(cls)}
        if told.get("version") != VERSION or unknown:
            raise ClipIndexError(
                f"preprocessing of version {told.get('version')} ({', '.join(sorted(unknown)) or 'known settings'}): "
                f"this clip-index has version {VERSION}; install the one that embedded the pictures, or embed again"
            )
        return cls(**settings)

    def _square(self, decoded: Decoded) -> np.ndarray:
        pixels, orientation, width, height = decoded
        resized = self.resized(width, height)
        left, top = (self._spare(side) for side in resized)
        if resized[0] * resized[1] > _WIDEST * self.size**2:
            window = (left, top, left + self.size, top + self.size)
            square = _resize_window(upright(pixels, orientation), resized, window, self.interpolation)
        else:
            # resized as it is stored and turned afterwards, when it is small
            stored = resized[::-1] if orientation >= 5 else resized
            square = self._crop_or_pad(upright(_resize(pixels, stored, self.interpolation), orientation), left, top)
        return np.ascontiguousarray(square)

    def _spare(self, side: int) -> int:
        """Where the square begins in a longer side, or (negative) the side in the square."""
        if side < self.size:
            return -((self.size - side) // 2)
        return round((side - self.size) / 2) if self.crop_offset == "round" else (side - self.size) // 2

    def _crop_or_pad(self, pixels: np.ndarray, left: int, top: int) -> np.ndarray:
        cropped = pixels[max(top, 0) : max(top, 0) + self.size, max(left, 0) : max(left, 0) + self.size]
        height, width = cropped.shape[:2]
        if height == width == self.size:
            return cropped
        square = np.full((self.size, self.size, 3), self.fill, np.uint8)
        square[-top : height - top, -left : width - left] = cropped
        return square


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 [h, w, 3] scaled to (width, height)."""
    if pixels.shape[1::-1] == size:
        return pixels
    if interpolation == "lanczos":
        return _resize_window(pixels, size, (0, 0, *size), interpolation)
    import torch

    # On 8-bit pixels torch has Pillow's algorithm, several times as fast, on one thread a picture. The batch axis comes
    # first: torch would not see from the strides of a later one that the channels are last, and write planes.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(planes, size=size[::-1], mode=interpolation, antialias=True)
    return scaled.permute(0, 2, 3, 1)[0].numpy()


def _resize_window(
    pixels: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int], interpolation: str
) -> np.ndarray:
    """The window (left, top, right, bottom) of the picture scaled to `size`, without making the rest of it.

    For 10000 x 10 pixels the whole would be 1,000 times the result. The two passes are asked for one by one, as torch
    makes them: Pillow before 13 goes along the rows first, later ones along the axis that is cheaper.
    """
    kept, boxes = [], []
    for axis in (0, 1):
        length = pixels.shape[1 - axis]
        scale = length / size[axis]
        begin, end = window[axis] * scale, min(window[axis + 2] * scale, length)
        reach = ceil(3 * max(scale, 1)) + 1  # Lanczos looks furthest, 3 pixels each way
        first, last = max(floor(begin) - reach, 0), min(ceil(end) + reach, length)
        kept.append(slice(first, last))
        boxes.append((begin - first, end - first))
    part = Image.fromarray(np.ascontiguousarray(pixels[kept[1], kept[0]]))
    filter_ = Image.Resampling[interpolation.upper()]
    width, height = window[2] - window[0], window[3] - window[1]
    rows = part.resize((width, part.height), filter_, box=(boxes[0][0], 0, boxes[0][1], part.height))
    return np.array(rows.resize((width, height), filter_, box=(0, boxes[1][0], width, boxes[1][1])))
