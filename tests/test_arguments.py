"""Words and flags against a signature: what is taken, and how what is wrong is named."""

from __future__ import annotations

from typing import Literal

import pytest

from clip_index.arguments import nearest, parse
from clip_index.command import describe
from clip_index.types import UsageError


def search(
    text: str | None = None,
    *,
    k: int = 10,
    index: str | None = None,
    rate: float = 0.5,
    workers: int | Literal["auto"] = "auto",
    modality: Literal["image", "text"] | None = None,
    json: bool = False,
    dry_run: bool = False,
    bar: bool = True,
) -> None:
    """Search."""


def copy(source: str, target: str, *, force: bool = False) -> None:
    """Copy."""


def take(number: int) -> None:
    """Take."""


def parsed(*argv: str, function=search) -> dict:
    return parse(describe(function.__name__, function), list(argv))


def refused(*argv: str, function=search) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(*argv, function=function)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["dog # cat", "a,b", "1984", "1e5", "None", "True", "{red}", "[x]", "-night", "-", "- snow", "-5", "\"it's\"",
     "\\n",      "a\nb", "🐕 犬", "a=b", "\udcff", "-- dashes", "help", "x" * 5000],
)  # fmt: skip
def test_texts_stay_as_they_are(text):
    assert parsed(text) == {"text": text}
    assert parsed("--text", text) == {"text": text}
    assert parsed(f"--text={text}") == {"text": text}


def test_values_become_what_the_annotation_says():
    assert parsed("--k", "20", "--rate=1e-3", "--modality", "text", "--index", "1984") == {
        "k": 20, "rate": 0.001, "modality": "text", "index": "1984",
    }  # fmt: skip
    assert parsed("--workers", "auto") == {"workers": "auto"}
    assert parsed("--workers", "4") == {"workers": 4}
    assert parsed("--k", "-5") == {"k": -5}
    assert parsed("7", function=take) == {"number": 7}


def test_dashes_and_underscores_are_the_same():
    assert parsed("--dry-run") == parsed("--dry_run") == {"dry_run": True}


@pytest.mark.parametrize(
    ("written", "value"),
    [("--json", True), ("--nojson", False), ("--no-json", False), ("--no_json", False), ("--json=true", True),
     ("--json=False", False), ("--json=0", False), ("--json=yes", True), ("--nojson=false", True)],
)  # fmt: skip
def test_truth_values(written, value):
    assert parsed(written, "dog") == {"json": value, "text": "dog"}


def test_a_truth_value_may_stand_apart_behind_the_last_word():
    assert parsed("dog", "--json", "False", "--k", "3") == {"text": "dog", "json": False, "k": 3}
    assert parsed("dog", "--nojson", "true") == {"text": "dog", "json": False}
    assert parsed("--text", "dog", "--json", "true") == {"text": "dog", "json": True}


def test_a_default_of_true_can_be_turned_off():
    assert parsed("--nobar") == {"bar": False}


def test_two_dashes_end_the_flags():
    assert parsed("--k", "3", "--", "--json") == {"k": 3, "text": "--json"}
    assert parsed("--", "a", "--force", function=copy) == {"source": "a", "target": "--force"}


def test_positional_parameters_may_come_as_flags():
    assert parsed("--target", "b", "a", function=copy) == {"source": "a", "target": "b"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dog", "--indx", "foo"], "unknown flag --indx: did you mean `--index`?"),
        (["dog", "--ind", "foo"], "did you mean `--index`?"),
        (["--K", "3"], "did you mean `--k`?"),
        (["-k", "3"], "unknown flag -k: did you mean `--k`?"),
        (["-k=3"], "did you mean `--k=3`?"),
        (["--zzzz"], "`clip-index search --help` lists the flags"),
        (["--dog in the snow"], "goes last, after ` -- `"),
        (["--k", "abc"], "--k abc: expected a whole number"),
        (["--k", "1.5"], "expected a whole number"),
        (["--k="], "--k is empty"),
        (["--index", ""], "--index is empty"),
        ([""], "TEXT is empty"),
        (["--rate", "nan"], "--rate nan: expected a number"),
        (["--rate", "fast"], "expected a number"),
        (["--workers", "many"], "expected auto or a whole number"),
        (["--modality", "images"], "expected image or text; did you mean image?"),
        (["--k"], "--k needs a value: a whole number"),
        (["--index", "--json"], "--index needs a value"),
        (["--k", "--", "3"], "--k needs a value"),
        (["--k", "3", "--k=4"], "--k is given twice"),
        (["dog", "--text", "cat"], "unexpected argument 'dog'"),
        (["--json=maybe"], "--json=maybe: expected true or false"),
        (["--json", "false"], "write `--json=false`"),
        (["a", "red", "dog"], "unexpected argument 'red'; a text of several words goes in quotes: \"a red dog\""),
        (["--no-index"], "unknown flag --no-index"),
    ],
)
def test_what_is_wrong_is_named(argv, says):
    assert says in refused(*argv)


def test_missing_arguments_are_named():
    assert refused(function=copy) == "copy: SOURCE and TARGET missing; it takes copy SOURCE TARGET [flags]"
    assert "TARGET missing" in refused("a", function=copy)
    assert "unexpected argument 'c'; it takes copy SOURCE TARGET" in refused("a", "b", "c", function=copy)


def test_flags_are_not_abbreviated():
    assert "did you mean" in refused("--dry")


def test_nearest_prefers_what_the_word_begins():
    names = ["input_format", "index", "index_key"]
    assert nearest("index_k", names) == "index_key"
    assert nearest("idnex", names) == "index"
    assert nearest("qqq", names) is None
