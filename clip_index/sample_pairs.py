"""The sample that ships with the package, as bytes: what models are calibrated on and measured with."""

from __future__ import annotations

from importlib.resources import files


def sample(number: int, start: int = 0) -> tuple[list[bytes], list[str]]:
    """(pictures, captions) of the sample that ships with the package: every nth, `number` of them.

    Two that start at 0 and 1 have nothing in common, for up to 150 each.
    """
    folder = files("clip_index") / "data" / "sample"
    pictures = sorted(
        (file.name, file)
        for part in folder.iterdir()
        if part.is_dir()
        for file in part.iterdir()
        if not file.name.endswith(".txt")
    )
    chosen = [file for _, file in pictures[start :: len(pictures) // number][:number]]
    data = [file.read_bytes() for file in chosen]
    return data, [file.with_suffix(".txt").read_text("utf-8").strip() for file in chosen]
