"""Make the sample pictures that come with the package, from Debian's `openclipart-png` (public domain).

    python pipelines/make_sample.py [--deb openclipart-png_*.deb]

1. Get the package with `apt-get download`, or take the file given; check its SHA-256 and unpack it.
2. Read `sample.tsv`: for each picture the file in the package, its author, the file to write, the caption.
3. Cut the empty border off, scale down, and pad a long picture, so that a crop of the centre keeps the subject.
4. Write the picture in the format that its name asks for, with its caption beside it.

The same list, package and Pillow give the same bytes. The list is a selection, not a benchmark: pictures of one clear
subject, that their authors have dedicated to the public domain, and rather those that the model `mini` can tell apart.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PACKAGE = "openclipart-png"
SHA256 = "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"  # version 1:0.18+dfsg-19
LIST = Path(__file__).with_name("sample.tsv")
SAMPLE = Path(__file__).parent.parent / "clip_index" / "data" / "sample"

LONG_SIDE = 288
LONGEST_ASPECT = 1.25
MARGIN = 0.03
"""White left around the subject, as a share of its long side."""
SAVE = {
    ".jpg": {"format": "JPEG", "quality": 85, "optimize": True, "progressive": True},
    ".png": {"format": "PNG", "optimize": True},
    ".webp": {"format": "WEBP", "quality": 80, "method": 4},
}
COLOURS = 128
"""Of a PNG's palette: these are drawings."""


def unpack(deb: Path | None, folder: Path) -> Path:
    """The folder of the package's pictures, below `folder`. Without a file, apt gets it."""
    if deb is None:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        deb = next(folder.glob(f"{PACKAGE}_*.deb"))
    found = hashlib.sha256(deb.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{deb} has SHA-256 {found}, not {SHA256}: this list was made for another version of {PACKAGE}")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "files")], check=True)
    return folder / "files" / "usr" / "share" / "openclipart" / "png"


def frame(picture: Image.Image) -> Image.Image:
    """An RGBA picture at most `LONG_SIDE` long; a drawing is also cut out and at most `LONGEST_ASPECT` long to wide."""
    picture = picture.convert("RGBA")
    if not fills_its_rectangle(picture):
        picture = cut_out(picture)
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return picture


def fills_its_rectangle(picture: Image.Image) -> bool:
    """Whether the corners are not white, as in a photograph: then white around it would be a frame."""
    flat = on_white(picture)
    return all(min(flat.getpixel((x, y))) < 250 for x in (0, picture.width - 1) for y in (0, picture.height - 1))


def cut_out(drawing: Image.Image) -> Image.Image:
    """What is not white, centred, with `MARGIN` around it."""
    drawing = drawing.crop(ImageChops.invert(on_white(drawing)).getbbox())
    margin = round(MARGIN * max(drawing.size))
    width, height = (side + 2 * margin for side in drawing.size)
    width, height = max(width, round(height / LONGEST_ASPECT)), max(height, round(width / LONGEST_ASPECT))
    framed = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    framed.paste(drawing, ((width - drawing.width) // 2, (height - drawing.height) // 2))
    return framed


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture without its transparency."""
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    return flat


def write(picture: Image.Image, path: Path) -> None:
    """PNGs have a palette, WebPs keep their transparency, JPEGs are plain."""
    if path.suffix != ".webp":
        picture = on_white(picture)
    if path.suffix == ".png":
        picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(path, **SAVE[path.suffix])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the package's sample pictures.")
    parser.add_argument("--deb", type=Path, help=f"the package {PACKAGE}, where it need not be downloaded")
    deb = parser.parse_args().deb
    with LIST.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with tempfile.TemporaryDirectory() as folder:
        pictures = unpack(deb, Path(folder))
        shutil.rmtree(SAMPLE, ignore_errors=True)
        for row in rows:
            path = SAMPLE / row["category"] / row["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(pictures / row["source"]) as picture:
                write(frame(picture), path)
            path.with_suffix(".txt").write_text(row["caption"] + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file())
    print(f"{len(rows)} pictures with captions, {size / 1e6:.2f} MB, in {SAMPLE}")


if __name__ == "__main__":
    main()
