"""Pictures in terminals: which protocol, and that each sequence holds the pixels it should."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image
from test_render import Terminal

from clip_index.render import Style
from clip_index.terminal import BOXES, gallery, protocol

COLOUR = Style(width=100, color=True)
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, "none"),
        ({"TERM": "xterm"}, "none"),
        ({}, "none"),
    ],
)
def test_the_terminal_says_what_it_understands(environ, expected):
    assert protocol("auto", Terminal(), COLOUR, environ) == expected


def test_a_pipe_gets_no_pictures_whatever_was_asked():
    for choice in ("auto", "kitty", "iterm", "blocks"):
        assert protocol(choice, io.StringIO(), Style(), {"TERM": "xterm-kitty"}) == "none"


def test_a_choice_is_taken():
    assert protocol("iterm", Terminal(), COLOUR, {}) == "iterm"
    assert protocol("none", Terminal(), COLOUR, {"TERM": "xterm-kitty"}) == "none"


def test_plain_terminals_get_no_pictures():
    assert protocol("auto", Terminal(), Style(width=100, color=False), {"COLORTERM": "truecolor"}) == "none"
    assert protocol("auto", Terminal(), Style(width=100, color=True, blocks=False), {"TERM": "xterm-kitty"}) == "none"


def test_half_blocks_are_two_pixels_a_cell():
    box = BOXES["blocks"]
    picture = Image.new("RGB", (box.columns, 2 * box.rows), RED)
    picture.paste(BLUE, (0, 1, box.columns, 2 * box.rows))  # the first pixel row red, the rest blue
    lines = gallery([picture], "blocks", 80).splitlines()
    assert len(lines) == box.rows + 1
    assert lines[0] == "\x1b[38;2;255;0;0;48;2;0;0;255m" + "▀" * box.columns + "\x1b[0m"
    assert lines[1] == "\x1b[38;2;0;0;255;48;2;0;0;255m" + "▀" * box.columns + "\x1b[0m"
    assert lines[-1].strip() == "1"


def test_half_blocks_leave_the_background_alone():
    box = BOXES["blocks"]
    wide = Image.new("RGB", (box.columns, 5), RED)  # 19 empty pixel rows: 9 above, 10 below
    lines = gallery([wide], "blocks", 80).splitlines()
    assert lines[3] == "\x1b[0m" + " " * box.columns + "\x1b[0m"
    assert lines[4] == "\x1b[0;38;2;255;0;0m" + "▄" * box.columns + "\x1b[0m"


def test_a_missing_picture_leaves_its_place():
    box = BOXES["blocks"]
    picture = Image.new("RGB", (box.columns, 2 * box.rows), RED)
    first = gallery([None, picture], "blocks", 80).splitlines()[0]
    assert first.startswith("\x1b[0m" + " " * (box.columns + 1) + "\x1b[38;2;255;0;0")


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_gallery_fits_the_terminal(width):
    pictures = [Image.new("RGB", (8, 8), RED)] * 30
    for how, box in BOXES.items():
        lines = gallery(pictures, how, width).splitlines()
        plain = [re.sub(r"\x1b(\[[0-9;]*m|_G[^\x1b]*\x1b\\|\]1337[^\x07]*\x07)", "", line) for line in lines]
        assert max(map(len, plain)) <= max(width, box.columns)
        assert str(min(30, box.capacity(width))) in plain[-1]


def test_kitty_gets_a_png_in_pieces():
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    drawn = gallery([noise], "kitty", 80).split("\n")[0]
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)
    assert pieces[0][0] == "a=T,f=100,q=2,c=16,r=8,m=1"
    assert [control for control, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in pieces)
    png = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert (png.format, png.size) == ("PNG", (320, 320))


def test_iterm_gets_one_png_with_its_size():
    drawn = gallery([Image.new("RGB", (8, 8), RED)] * 2, "iterm", 80).split("\n")[0]
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=33;height=8;preserveAspectRatio=1:(.*)\x07", drawn)
    data = base64.b64decode(found[2])
    assert len(data) == int(found[1])
    strip = Image.open(io.BytesIO(data))
    assert strip.size == (33 * 20, 8 * 40)
    assert strip.getpixel((160, 160)) == (255, 0, 0, 255)
    assert strip.getpixel((330, 160))[3] == 0  # the gap between the two
