"""A command's description and its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from clip_index.command import Program, command_help, describe, program_help, welcome, with_options


def bake(flour: str, oven: str | None = None, *, degrees: int = 200, kind: Literal["rye", "wheat"] = "rye",
         fan: bool = False, timer: bool = True, label: str | None = None) -> None:  # fmt: skip
    """Bake a loaf.

    It takes an hour.

    Examples:
        shop bake flour.bag
        shop bake flour.bag --kind wheat

    Args:
        flour: what to bake, and this explanation goes on
            in a second line
        oven: where
        degrees: how hot
        kind: which
        fan: with air
        timer: ring at the end
        label: what to call it
    """


SHOP = Program("shop", "1.2", "bread", (("shop bake flour.bag", "a first loaf"),), {"bake": bake})


def test_a_signature_is_read():
    command = describe("bake", bake)
    assert [(item.name, item.kind, item.positional, item.required) for item in command.parameters] == [
        ("flour", str, True, True),
        ("oven", str, True, False),
        ("degrees", int, False, False),
        ("kind", None, False, False),
        ("fan", bool, False, False),
        ("timer", bool, False, False),
        ("label", str, False, False),
    ]
    assert command.parameters[3].choices == ("rye", "wheat")
    assert command.usage == "bake FLOUR [OVEN] [flags]"
    assert command.summary == "Bake a loaf."
    assert command.examples == ("shop bake flour.bag", "shop bake flour.bag --kind wheat")
    assert command.parameters[0].help == "what to bake, and this explanation goes on in a second line"


@dataclass(frozen=True)
class Wrapping:
    """How a loaf is wrapped.

    Args:
        paper: what it is wrapped in,
            if at all
        string: how much
    """

    paper: Literal["brown", "none"] = "brown"
    string: int = 3


def test_fields_of_a_dataclass_become_flags():
    sold = []

    @with_options(Wrapping)
    def sell(loaf: str, *, options: Wrapping, price: float = 2.5) -> None:
        """Sell a loaf.

        Args:
            loaf: which
            price: for how much
        """
        sold.append((loaf, options, price))

    command = describe("sell", sell)
    assert [(item.name, item.kind, item.default) for item in command.parameters] == [
        ("loaf", str, None), ("price", float, 2.5), ("paper", None, "brown"), ("string", int, 3),
    ]  # fmt: skip
    assert [item.help for item in command.parameters] == [
        "which", "for how much", "what it is wrapped in, if at all", "how much",
    ]  # fmt: skip
    sell("rye", string=1)
    assert sold == [("rye", Wrapping("brown", 1), 2.5)]


def varying(*words: str) -> None: ...
def keywords(**options: str) -> None: ...
def anything(value: Any) -> None: ...
def either(value: int | str) -> None: ...
def untyped(value) -> None: ...


@pytest.mark.parametrize("function", [varying, keywords, anything, either, untyped])
def test_signatures_that_no_command_line_can_fill_are_refused(function):
    with pytest.raises(TypeError, match="cannot be filled from a command line"):
        describe("odd", function)


def test_help_shows_examples_before_the_flags(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = command_help(SHOP, "bake")
    assert text.index("shop bake flour.bag") < text.index("Usage") < text.index("Flags")
    assert "--degrees N" in text and "how hot [200]" in text
    assert "--kind rye|wheat" in text and "which [rye]" in text
    assert "--fan " in text and "--notimer" in text
    assert "what to call it\n" in text
    assert "It takes an hour." in text


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_help_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = f"{command_help(SHOP, 'bake')}\n{program_help(SHOP)}"
    assert max(map(len, text.splitlines())) <= min(100, int(columns))


def test_the_program_names_its_commands():
    assert "bake  Bake a loaf." in program_help(SHOP)
    assert welcome(SHOP).splitlines() == [
        "shop 1.2: bread",
        "  shop bake flour.bag  a first loaf",
        "shop --help tells the rest",
    ]
