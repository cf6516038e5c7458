from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import (
    FORMATS,
    animated,
    bad_pictures,
    claiming,
    encode,
    exif,
    odd_pictures,
    oriented,
    photo,
    png_chunk,
    png_with,
)
from PIL import Image, ImageOps

from clip_index.decode import decode, exif_orientation, jpeg_orientation
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, SampleError, UsageError

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

# (width, height), and what torchvision 0.29 makes of it for 224: the size that Resize scales it to, where CenterCrop
# begins, the size that open_clip 3.3 scales it to for "longest", where the picture begins in the padding.
GEOMETRY = [
    ((1024, 768), (298, 224), (37, 0), (224, 168), (0, 28)),
    ((333, 500), (224, 336), (0, 56), (149, 224), (37, 0)),
    ((500, 333), (336, 224), (56, 0), (224, 149), (0, 37)),
    ((1, 1), (224, 224), (0, 0), (224, 224), (0, 0)),
    ((3, 2), (336, 224), (56, 0), (224, 149), (0, 37)),
    ((17, 30), (224, 395), (0, 86), (127, 224), (48, 0)),
    ((224, 300), (224, 300), (0, 38), (167, 224), (28, 0)),
    ((225, 223), (226, 224), (1, 0), (224, 222), (0, 1)),
    ((90, 601), (224, 1495), (0, 636), (34, 224), (95, 0)),
    ((2000, 411), (1090, 224), (433, 0), (224, 46), (0, 89)),
]


def by_pillow(pixels: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Pillow's resize, along the rows first, as all versions before 13 do it."""
    image = Image.fromarray(pixels)
    rows = image.resize((size[0], image.height), FILTERS[interpolation])
    return np.asarray(rows.resize(size, FILTERS[interpolation]))


def levels_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b)


def plain(*rows: list) -> np.ndarray:
    """A tiny picture from its levels: [h][w] for grey, [h][w][channels] otherwise."""
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("given", "short", "crop", "long", "pad"), GEOMETRY)
def test_pixels_are_torchvisions_to_within_two_levels(given, short, crop, long, pad, interpolation):
    pixels = photo(*given)
    file = encode(pixels, "BMP")
    (left, top), (x, y) = crop, pad
    expected = {
        "shortest": by_pillow(pixels, short, interpolation)[top : top + 224, left : left + 224],
        "squash": by_pillow(pixels, (224, 224), interpolation),
        "longest": np.full((224, 224, 3), 9, np.uint8),
    }
    expected["longest"][y : y + long[1], x : x + long[0]] = by_pillow(pixels, long, interpolation)
    for mode, reference in expected.items():
        found, size = Preprocess(resize_mode=mode, interpolation=interpolation, fill=9)(file)
        assert size == given and found.flags.c_contiguous and found.flags.writeable
        apart = levels_apart(found, reference)
        assert apart.max() <= 2 and apart.mean() < 0.02, mode


@pytest.mark.parametrize(
    ("width", "round_", "floor"), [(4, 0, 0), (5, 0, 0), (6, 1, 1), (7, 2, 1), (9, 2, 2), (11, 4, 3)]
)
def test_an_odd_number_of_spare_columns_is_halved_either_way(width, round_, floor):
    columns = np.repeat(np.arange(width, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)
    for offset, first in (("round", round_), ("floor", floor)):
        found, _ = Preprocess(size=4, crop_offset=offset)(encode(columns))
        assert found[0, :, 0].tolist() == list(range(first, first + 4))


@pytest.mark.parametrize("given", [(640, 480), (333, 517), (517, 333), (31, 17), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 5}])
def test_jpeg_decodes_to_pillows_levels(given, options):
    file = encode(photo(*given), "JPEG", **options)
    pixels, orientation, *size = decode(file)
    assert (orientation, tuple(size)) == (1, given)
    assert levels_apart(pixels, np.asarray(Image.open(io.BytesIO(file)))).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_pillows(kind, orientation):
    file = oriented(photo(75, 50), orientation, kind)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    for preprocess in (Preprocess(size=32), Preprocess(size=32, resize_mode="longest"), Preprocess(size=4)):
        found, size = preprocess(file)
        expected, _ = preprocess(encode(turned))
        assert size == turned.size
        apart = levels_apart(found, expected)
        # a picture that is resized before it is turned had its passes, with their rounding, in the other order
        assert apart.max() <= (4 if orientation >= 5 else 2) and apart.mean() < 0.5


def test_orientation_of_odd_jpegs():
    cmyk = encode(Image.fromarray(photo(40, 20)).convert("CMYK"), "JPEG", exif=exif(8))
    assert Preprocess(size=8)(cmyk)[1] == (20, 40)
    comment_first = encode(photo(40, 20), "JPEG", exif=exif(5), comment=b"words")
    assert jpeg_orientation(comment_first) == 5
    fill = comment_first.replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1)
    assert jpeg_orientation(fill) == 5
    assert jpeg_orientation(encode(photo(40, 20), "JPEG")) == 1


def test_a_png_text_named_exif_is_only_a_text():
    assert (
        decode(png_with(encode(photo(40, 20)), png_chunk(b"zTXt", b"exif\0\0" + zlib.compress(b"words")))).orientation
        == 1
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_in_both_byte_orders_and_broken(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = mark + struct.pack(order + "IHHHIIHHIHH", 8, 2, 0x0100, 3, 1, 7, 0x0112, 3, 1, 6, 0)
    assert exif_orientation(body) == 6
    long = mark + struct.pack(order + "IHHHII", 8, 1, 0x0112, 4, 1, 3)
    assert exif_orientation(long) == 3
    assert exif_orientation(long[:-4] + struct.pack(order + "I", 9)) == 1
    for end in range(len(body)):
        assert exif_orientation(body[:end]) in range(1, 9)
    rng = np.random.default_rng(0)
    for _ in range(300):
        noise = mark + rng.bytes(60)
        assert exif_orientation(noise) in range(1, 9)
        assert jpeg_orientation(b"\xff\xd8\xff\xe1" + rng.bytes(3) + noise) in range(1, 9)


def test_transparency_lies_on_white():
    row = plain([[0, 0, 0, 0], [0, 0, 0, 128], [10, 20, 30, 255]])
    for file in (encode(row), encode(row, "WEBP", lossless=True, exact=True), encode(row, "TIFF")):
        assert decode(file).pixels.tolist() == [[[255] * 3, [127] * 3, [10, 20, 30]]]
    grey = Image.merge("LA", [Image.fromarray(plain(levels)) for levels in ([0, 0], [0, 255])])
    assert decode(encode(grey)).pixels[0, :, 0].tolist() == [255, 0]
    palette = Image.fromarray(plain([0, 1]))
    palette.putpalette([200, 100, 50, 1, 2, 3])
    for kind in ("PNG", "GIF"):
        assert decode(encode(palette, kind)).pixels.tolist() == [[[200, 100, 50], [1, 2, 3]]]
        assert decode(encode(palette, kind, transparency=0)).pixels.tolist() == [[[255] * 3, [1, 2, 3]]]
    coloured = encode(plain([[5, 5, 5], [6, 6, 6]]), transparency=(5, 5, 5))
    assert decode(coloured).pixels[0, :, 0].tolist() == [255, 6]


@pytest.mark.parametrize(
    ("values", "kind", "levels"),
    [
        (np.array([[0, 0x00FF, 0x8000, 0xFFFF]], np.uint16), "PNG", [0, 0, 128, 255]),
        (np.array([[0, 0x00FF, 0x8000, 0xFFFF]], np.uint16), "TIFF", [0, 0, 128, 255]),
        (np.array([[0, 1, 200]], np.uint16), "PNG", [0, 0, 0]),  # dark, and not stretched
        (np.array([[0.0, 0.5, 1.0]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[-4.0, 7.0, 200.0]], np.float32), "TIFF", [0, 7, 200]),
        (np.array([[np.nan, np.inf, 1.0]], np.float32), "TIFF", [0, 0, 255]),
        (np.array([[0, 257, 65535]], np.int32), "TIFF", [0, 1, 255]),
        (np.array([[0, 1 << 20, 1 << 21]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0, 0, 0]], np.float32), "TIFF", [0, 0, 0]),
    ],
)
def test_greys_of_more_than_8_bits(values, kind, levels):
    pixels = decode(encode(values, kind)).pixels
    assert pixels[0].tolist() == [[level] * 3 for level in levels]


def test_black_and_white_and_cmyk():
    assert decode(encode(Image.fromarray(plain([0, 255])).convert("1"))).pixels[0, :, 1].tolist() == [0, 255]
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        cyan = decode(encode(inks, kind)).pixels[8, 8].astype(int)
        assert np.abs(cyan - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_the_first_frame_counts(kind):
    pixels = photo(40, 30)
    still = "JPEG" if kind == "MPO" else kind
    first = decode(encode(pixels, still)).pixels
    assert levels_apart(decode(animated(pixels, kind)).pixels, first).mean() < 4


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_decode(name):
    file = odd_pictures()[name]
    size = {"1x1": (1, 1), "1x1 jpeg": (1, 1), "one column": (1, 5000), "one row": (5000, 1)}.get(name, (61, 43))
    for preset in ("exact", "fast"):
        pixels, found = Preprocess(size=24, preset=preset)(file)
        assert pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8
        assert found == (size[::-1] if name == "lying on its side" else size)
    if len(set(size)) > 1 and 1 not in size and "transparent" not in name and name != "lying on its side":
        # whatever it is stored as, it is still the picture
        levels = Preprocess(size=24)(encode(Image.fromarray(photo(61, 43)).convert("L")))[0][:, :, 0]
        assert np.corrcoef(levels.ravel(), pixels.mean(axis=2).ravel())[0, 1] > 0.7


@pytest.mark.parametrize("name", bad_pictures())
def test_bad_pictures_are_refused_in_one_line(name):
    with pytest.raises(SampleError) as refused:
        Preprocess()(bad_pictures()[name])
    message = str(refused.value)
    assert message and "\n" not in message and " at 0x" not in message and len(message) <= 200


@pytest.mark.parametrize("kind", FORMATS)
def test_the_number_of_pixels_is_looked_at_before_they_are_decoded(kind):
    with pytest.raises(SampleError, match="too many pixels: 10000 x 10000, and at most 1,000,000 are"):
        Preprocess(max_pixels=1_000_000)(claiming(kind, 10_000, 10_000))
    with pytest.raises(SampleError, match="too many pixels"):
        Preprocess()(claiming(kind, 16_000, 16_000))
    assert Preprocess(max_pixels=100)(encode(photo(10, 10), kind))[1] == (10, 10)
    with pytest.raises(SampleError, match=r"too many pixels: 10 x 11, and at most 100 are"):
        Preprocess(max_pixels=100)(encode(photo(10, 11), kind))


def test_a_damaged_jpeg_is_refused_and_a_harmless_one_is_not():
    file = encode(photo(200, 100), "JPEG", restart_marker_rows=1)
    whole, _ = Preprocess(size=32)(file)
    for harmless in (file + b"trailing", file[:-2] + bytes(5) + file[-2:]):
        np.testing.assert_array_equal(Preprocess(size=32)(harmless)[0], whole)
    at = file.index(b"\xff\xd2")
    with pytest.raises(SampleError, match="damaged JPEG: found marker 0xd6 instead of RST2"):
        Preprocess(size=32)(file[: at + 1] + b"\xd6" + file[at + 2 :])


def test_noise_in_a_file_costs_at_most_that_file():
    rng = np.random.default_rng(3)
    preprocess = Preprocess(size=16)
    outcomes = set()
    for kind in FORMATS:
        file = encode(photo(40, 30), kind)
        for _ in range(60):
            noisy = bytearray(file)
            for at in rng.integers(0, len(file), 4):
                noisy[at] = rng.integers(0, 256)
            try:
                outcomes.add(preprocess(bytes(noisy))[0].shape)
            except SampleError:
                outcomes.add("refused")
    assert outcomes == {(16, 16, 3), "refused"}


def test_pillows_warnings_do_not_leak_and_others_do():
    no_frames = png_with(encode(photo(20, 20)), png_chunk(b"acTL", bytes(8)))
    with pytest.raises(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(no_frames))
    assert Preprocess(size=20)(no_frames)[1] == (20, 20)
    with pytest.raises(SampleError, match="too many pixels: 10000 x 10000"):  # above what Pillow warns of
        Preprocess(max_pixels=50_000_000)(claiming("PNG", 10_000, 10_000))
    with pytest.raises(UserWarning):
        warnings.warn("ours", UserWarning, stacklevel=1)


@pytest.mark.parametrize(("given", "turned"), [((900, 40), 1), ((40, 900), 1), ((900, 40), 6), ((40, 900), 8)])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_of_a_very_long_picture_only_the_middle_is_made(given, turned, interpolation):
    pixels = np.random.default_rng(5).integers(0, 256, (*given[::-1], 3), dtype=np.uint8)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(oriented(pixels, turned, "PNG")))))
    height, width = upright.shape[:2]
    resized = (32, 32 * height // width) if width < height else (32 * width // height, 32)
    left, top = (round((side - 32) / 2) for side in resized)
    expected = by_pillow(upright, resized, interpolation)[top : top + 32, left : left + 32]
    found, _ = Preprocess(size=32, interpolation=interpolation)(oriented(pixels, turned, "PNG"))
    assert levels_apart(found, expected).max() <= 2


def test_a_line_does_not_fill_the_memory():
    line = np.repeat(np.arange(60_000, dtype=np.uint16)[None, :, None] // 236, 3, axis=2).astype(np.uint8)
    found, size = Preprocess(size=224)(encode(line))  # the whole, 224 rows high, would be 9 GB
    assert size == (60_000, 1) and set(found.ravel().tolist()) <= {126, 127, 128}
    fitted, _ = Preprocess(size=4, resize_mode="longest")(encode(line))
    assert [len(set(row.ravel().tolist())) for row in fitted] == [1, 4, 1, 1]  # never thinner than one row


def test_fast_decodes_fewer_pixels_of_the_same_picture():
    file = encode(photo(1024, 768), "JPEG")
    fast = Preprocess(preset="fast")
    assert decode(file, needed=fast.resized).pixels.shape == (384, 512, 3)  # a quarter would be 192 rows, too few
    assert decode(file, needed=Preprocess(size=192).resized).pixels.shape == (192, 256, 3)
    assert decode(file, needed=Preprocess(size=500).resized).pixels.shape == (768, 1024, 3)
    lying = oriented(photo(1023, 601), 6)
    assert decode(lying, needed=Preprocess(size=200).resized).pixels.shape == (301, 512, 3)
    for data in (file, lying):
        for options in ({}, {"resize_mode": "squash"}, {"resize_mode": "longest"}, {"interpolation": "bilinear"}):
            exact, size = Preprocess(**options)(data)
            found, same = Preprocess(**options, preset="fast")(data)
            assert same == size and levels_apart(found, exact).mean() < 1.5
    small = encode(photo(300, 230), "JPEG")
    np.testing.assert_array_equal(fast(small)[0], Preprocess()(small)[0])


def test_threads_give_what_one_gives():
    files = list(odd_pictures().values()) * 4
    preprocess = Preprocess(size=32)
    alone = [preprocess(file)[0] for file in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda file: preprocess(file)[0], files))
    np.testing.assert_array_equal(alone, together)


def test_it_describes_itself_and_comes_back():
    preprocess = Preprocess(size=256, resize_mode="squash", interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    told = json.loads(json.dumps(preprocess.describe()))
    assert told == preprocess.describe() and Preprocess.from_describe(told) == preprocess
    assert Preprocess(max_pixels=5).describe() == Preprocess().describe()
    settings = {"size": 9, "crop_offset": "floor", "fill": 3, "preset": "fast", "interpolation": "lanczos"}
    for name, value in settings.items():
        assert Preprocess(**{name: value}).describe() != Preprocess().describe()
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess


@pytest.mark.parametrize("change", [{"version": 2}, {"sharpen": True}, {"version": None}])
def test_a_description_of_another_version_is_refused(change):
    with pytest.raises(ClipIndexError, match=r"preprocessing of version .*embed again"):
        Preprocess.from_describe({**Preprocess().describe(), **change})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"resize_mode": "longer"}, "resize_mode is 'longer': choose one of shortest, squash, longest"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"crop_offset": "ceil"}, "crop_offset is 'ceil': choose one of round, floor"),
        ({"preset": "int8"}, "preset is 'int8'"),
        ({"size": 0}, "size is 0: choose 1 to 4096"),
        ({"fill": 256}, "fill is 256"),
        ({"max_pixels": 10**9}, "max_pixels is 1000000000"),
        ({"mean": (0.5, 0.5)}, "mean is .*three numbers"),
    ],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        Preprocess(**wrong)


def test_a_spawned_process_gives_the_same():
    file = encode(photo(32, 32), "JPEG")
    preprocess = Preprocess(size=32)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pixels, size = pool.apply(preprocess, (file,))
    np.testing.assert_array_equal(pixels, preprocess(file)[0])
    assert size == (32, 32)


def test_describing_does_not_import_torch():
    code = "import sys; from clip_index import preprocess; preprocess.Preprocess().describe(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "clip_index.preprocess" in modules and "torch" not in modules
