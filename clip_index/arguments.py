"""The words and flags of a command line, checked against a command's parameters.

Nothing is guessed: a flag that is not known, given twice, cut short or without its value is refused, and so is a value
of the wrong type. The message names what was written and what is expected.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from clip_index.command import Command, Parameter

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def nearest(word: str, names: Collection[str]) -> str | None:
    """The name that was probably meant: one that the word begins, else the most similar one."""
    word = word.lower()
    begun = [name for name in names if len(word) > 1 and name.lower().startswith(word)]
    return (begun or [*difflib.get_close_matches(word, names, 1), None])[0]


def reject(message: str) -> NoReturn:
    """Raise UsageError."""
    from clip_index.types import UsageError  # numpy comes with it: --help does without

    raise UsageError(message)


def parse(command: Command, argv: list[str]) -> dict[str, Any]:
    """{parameter: value} of a command's words and flags. Raises UsageError naming what is wrong and what is expected.

    `--key value` and `--key=value` are the same, so are dashes and underscores in a flag's name; `--json` and
    `--nojson` set a truth value, and so does `--json False` behind the last word; `--` ends the flags. A single dash
    begins a flag only if it spells a parameter's name, so that `-night` is a text.
    """
    by_name = {item.name: item for item in command.parameters}
    values: dict[str, Any] = {}
    words: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if token == "--":
            words += tokens
            break
        if token.startswith("-") and token[1:].partition("=")[0] in by_name:
            reject(f"unknown flag {token}: did you mean `-{token}`?")
        if not _is_flag(token):
            words.append(token)
            continue
        written, equals, raw = token.partition("=")
        parameter, negated = _lookup(command, by_name, written)
        if parameter.kind is bool:
            if tokens and not equals and tokens[0].lower() in ("true", "false"):
                if not _all_given(command, words, values):
                    reject(f"{written} {tokens[0]}: write `{written}={tokens[0].lower()}`")
                equals, raw = "=", tokens.popleft()
            value = not negated if not equals else _boolean(written, raw) != negated
        else:
            if not equals:
                if not tokens or tokens[0] == "--" or _is_flag(tokens[0]):
                    reject(f"{written} needs a value: {parameter.expects}")
                raw = tokens.popleft()
            value = _convert(parameter, written, raw)
        if parameter.name in values:
            reject(f"{written} is given twice")
        values[parameter.name] = value
    return _place(command, words, values)


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2 and not token[2].isspace()


def _lookup(command: Command, by_name: dict[str, Parameter], written: str) -> tuple[Parameter, bool]:
    """(parameter, whether `no` stands before its name) of a flag as written."""
    name = written[2:].replace("-", "_")
    if name in by_name:
        return by_name[name], False
    for prefix in ("no_", "no"):
        positive = by_name.get(name.removeprefix(prefix))
        if name.startswith(prefix) and positive and positive.kind is bool:
            return positive, True
    guess = nearest(name, by_name)
    if guess:
        reject(f"unknown flag {written}: did you mean `--{guess}`?")
    if any(letter.isspace() for letter in written):
        reject(f"unknown flag {written!r}: a text that begins with two dashes goes last, after ` -- `")
    reject(f"unknown flag {written}: `clip-index {command.name} --help` lists the flags")


def _all_given(command: Command, words: list[str], values: dict[str, Any]) -> bool:
    """Whether a command takes no more words, so that the next one can only be a flag's value."""
    return len(words) >= sum(item.positional and item.name not in values for item in command.parameters)


def _place(command: Command, words: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """Give the words to the positional parameters that no flag has filled, and check that nothing is left."""
    places = [item for item in command.parameters if item.positional and item.name not in values]
    if len(words) > len(places):
        extra = words[len(places)]
        hint = f"it takes {command.usage}"
        if places and places[-1].kind is str and not places[-1].required:
            hint = f'a text of several words goes in quotes: "{" ".join(words[len(places) - 1 :])}"'
        reject(f"{command.name}: unexpected argument {extra!r}; {hint}")
    for item, word in zip(places, words, strict=False):
        values[item.name] = _convert(item, item.name.upper(), word)
    missing = [item for item in command.parameters if item.required and item.name not in values]
    if missing:
        names = " and ".join(item.name.upper() if item.positional else item.flag for item in missing)
        reject(f"{command.name}: {names} missing; it takes {command.usage}")
    return values


def _boolean(written: str, raw: str) -> bool:
    if raw.lower() not in _TRUE + _FALSE:
        reject(f"{written}={raw}: expected true or false")
    return raw.lower() in _TRUE


def _convert(parameter: Parameter, written: str, raw: str) -> Any:
    """A value as its parameter's type."""
    if not raw:
        reject(f"{written} is empty: expected {parameter.expects}")
    if raw in parameter.choices:
        return raw
    if parameter.kind is str:
        return raw
    if parameter.kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", raw):
        return int(raw)
    if parameter.kind is float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
    if parameter.kind is bool:
        return _boolean(written, raw)
    guess = nearest(raw, parameter.choices)
    hint = f"; did you mean {guess}?" if guess else ""
    reject(f"{written} {raw}: expected {parameter.expects}{hint}")
