"""Results as text: the table's columns and widths, where matches get weaker, and strict JSON."""

from __future__ import annotations

import datetime
import io
import json
import math

import numpy as np
import pytest

from clip_index.render import Style, cells_of, columns, cut, label, printable, results_table, to_json, weaker_from
from clip_index.types import Hit


def hit(score: float, caption: str | None = "a dog", path: str = "pets/rex.jpg", key: str = "pets/rex") -> Hit:
    return Hit(0, score, key, {"caption": caption, "image_path": path})


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("scores", "position"),
    [
        ([], None),
        ([0.5], None),
        ([0.9, 0.3], 1),
        ([0.31, 0.30], None),
        ([0.60, 0.55, 0.40], 2),  # a quarter of the best
        ([0.60, 0.55, 0.41], None),
        ([0.60, 0.59, 0.58, 0.52, 0.51, 0.50], 3),  # a tenth of the best, three fifths of the spread
        ([0.60, 0.59, 0.58, 0.52, 0.51], None),  # too few to say that it stands out
        ([0.60, 0.59, 0.58, 0.54, 0.53, 0.52], None),  # half of the spread, and still next to nothing
        ([0.60, 0.55, 0.50, 0.44, 0.39, 0.34], None),  # falls evenly
        ([0.90, 0.60, 0.58, 0.30], 1),  # the larger of two steps
        ([-0.1, -0.5], None),
        ([0.0, -0.5], None),
        ([0.5, 0.5, 0.5], None),
    ],
)
def test_weaker_matches_begin_after_a_clear_step(scores, position):
    assert weaker_from(scores) == position


def test_a_plain_table_says_everything():
    table = results_table([hit(0.5, "a dog"), hit(0.25, None, "b/cat.jpg", "b/cat")], Style())
    first, rule, second = table.splitlines()
    assert first == "1   0.500  ████████████████  a dog  pets/rex.jpg"
    assert "weaker matches below" in rule
    assert second == "2   0.250  ████████          b/cat  b/cat.jpg"
    assert "\x1b" not in table


def test_bars_start_at_zero_and_do_without_block_characters():
    scores = [0.8, 0.7, 0.6, -0.1]
    lines = results_table([hit(score) for score in scores], Style(blocks=False)).splitlines()
    bars = [line.count("#") for line in lines if "weaker" not in line]
    assert bars == [16, 14, 12, 0]
    assert all(ord(char) < 128 for line in lines for char in line)


def test_scores_below_zero_have_no_bar():
    assert "█" not in results_table([hit(-0.2), hit(-0.3)], Style())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("caption", ["short", "a caption that goes on " * 40, "犬" * 200, "é́" * 300, None])
def test_a_terminal_line_is_never_wider_than_the_terminal(width, caption):
    hits = [hit(0.5, caption, "a/very/long/path/" * 20 + "name.jpg"), hit(0.49, caption, "x.jpg")]
    lines = results_table(hits, Style(width=width)).splitlines()
    assert all(cells_of(line) <= width for line in lines)
    assert "x.jpg" in lines[1]
    assert lines[0].endswith("name.jpg")


def test_a_pipe_gets_whole_paths():
    path = "p/" * 200 + "x  y.jpg"
    assert path in results_table([hit(0.5, path=path)], Style())


def test_a_terminal_gets_paths_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hits = [hit(0.5, path=str(tmp_path / "a" / "b.jpg")), hit(0.5, path=f"{tmp_path}2/c.jpg")]
    assert [line.split()[-1] for line in results_table(hits, Style(width=500)).splitlines()] == [
        "a/b.jpg", f"{tmp_path}2/c.jpg",
    ]  # fmt: skip
    assert str(tmp_path / "a" / "b.jpg") in results_table(hits, Style())


def test_colours_only_where_the_terminal_has_them():
    assert Style.of(Terminal(), {"TERM": "xterm"}).color
    assert not Style.of(Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}).color
    assert not Style.of(Terminal(), {"TERM": "dumb"}).color
    assert Style.of(io.StringIO(), {"TERM": "xterm"}) == Style(None, False, False)
    assert "\x1b[36m" in results_table([hit(0.5)], Style(color=True))


def test_a_caption_cannot_drive_the_terminal():
    evil = hit(0.5, "a\x1b]0;owned\x07dog\r\n\u202ebad\x9b2J", "p\x1b[2J.jpg", "k")
    table = results_table([evil], Style())
    assert not any(char in table for char in "\x1b\x07\r\u202e\x9b")
    assert len(table.splitlines()) == 1


def test_joiners_stay():
    assert printable("می\u200cروم") == "می\u200cروم"


def test_nothing_found_is_said():
    assert results_table([], Style()) == "nothing found"


def test_a_hit_without_a_caption_is_called_by_its_key_unless_the_path_ends_in_it():
    assert label(hit(1, "")) == label(hit(1, None)) == "pets/rex"
    assert label(hit(1, None, "/data/pets/rex.jpg", "pets/rex.jpg")) == ""
    assert label(hit(1, None, "", "00042")) == "00042"
    table = results_table([hit(0.5, None, "/data/a.jpg", "a.jpg")], Style())
    assert table == "1   0.500  ████████████████  /data/a.jpg"


def test_cells():
    assert cells_of("abc") == 3
    assert cells_of("犬b") == 3
    assert cells_of("e\u0301") == 1
    assert cut("abcdef", 4) == "abc…"
    assert cut("abcdef", 4, keep_end=True) == "…def"
    assert cut("犬犬犬", 4) == "犬…"
    assert cut("abc", 3) == "abc"
    assert cut("abc", 0) == ""


def test_columns_line_up():
    rows = [{"name": "mini", "dim": 384}, {"name": "犬", "dim": None}]
    assert columns(rows, Style()).splitlines() == ["name  dim", "mini  384", "犬"]
    assert columns(rows, Style(width=7)).splitlines() == ["name  …", "mini  …", "犬"]


def test_json_is_strict():
    document = {
        "score": np.float32(0.5), "bad": math.nan, "worse": [math.inf, -math.inf], "day": datetime.date(2020, 1, 2),
        "rows": np.int64(3), "none": None, "yes": True, 4: ("a", "犬"),
    }  # fmt: skip
    text = to_json(document)
    assert "犬" in text
    assert json.loads(text) == {
        "score": 0.5, "bad": None, "worse": [None, None], "day": "2020-01-02", "rows": 3, "none": None, "yes": True,
        "4": ["a", "犬"],
    }  # fmt: skip
    assert to_json("犬", ascii_only=True) == '"\\u72ac"'
