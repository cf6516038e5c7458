"""A command as people see it: its parameters come from the function's signature, its help from the docstring.

A command is a function. Parameters before the `*` are positional, those after it are flags; annotations say what a
value may be: str, int, float, bool, `Literal` choices, and `| None`. The docstring holds a summary line, then what is
worth saying, then `Examples:`, then `Args:` with a line for each parameter.
"""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

KINDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Parameter:
    """One argument or flag: `kind` is the type that a value becomes, `choices` are words allowed as they are."""

    name: str
    kind: type | None
    choices: tuple[str, ...]
    required: bool
    default: Any
    positional: bool
    help: str

    @property
    def flag(self) -> str:
        """How it is written as a flag."""
        return f"--{self.name}"

    @property
    def placeholder(self) -> str:
        """What stands for its value in the usage line."""
        if self.choices and self.kind is None:
            return "|".join(self.choices)
        return {int: "N", float: "X"}.get(self.kind, self.name.upper())  # type: ignore[arg-type]

    @property
    def expects(self) -> str:
        """The values that it takes, in words."""
        return " or ".join([*self.choices, *([KINDS[self.kind]] if self.kind else [])])


@dataclass(frozen=True)
class Command:
    """A function with everything that the front door and the help need to know about it."""

    name: str
    function: Callable[..., None]
    parameters: tuple[Parameter, ...]
    summary: str
    notes: str
    examples: tuple[str, ...]

    @property
    def usage(self) -> str:
        """The line that shows its arguments, optional ones in brackets."""
        shown = [item.name.upper() for item in self.parameters if item.positional]
        needed = [item.name.upper() for item in self.parameters if item.positional and item.required]
        words = [word if word in needed else f"[{word}]" for word in shown]
        flags = ["[flags]"] if any(not item.positional for item in self.parameters) else []
        return " ".join([self.name, *words, *flags])


@dataclass(frozen=True)
class Program:
    """A set of commands under one name; `start` is what a newcomer should type, a (command line, why) each."""

    name: str
    version: str
    summary: str
    start: tuple[tuple[str, str], ...]
    commands: dict[str, Callable[..., None]]

    def command(self, name: str) -> Command:
        """A command described. Raises KeyError."""
        return describe(name, self.commands[name])


def with_options(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameter `options` is a dataclass: each field is a flag, explained there."""
    fields = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in _resolved(options).parameters.values()]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> None:
            given = {item.name: values.pop(item.name) for item in fields if item.name in values}
            function(*args, options=options(**given), **values)

        signature = _resolved(function)
        own = [item for item in signature.parameters.values() if item.name != "options"]
        command.__signature__ = signature.replace(parameters=[*own, *fields])
        explained = inspect.cleandoc(options.__doc__ or "").partition("\nArgs:\n")[2]
        command.__doc__ = f"{inspect.getdoc(function)}\n{explained}"
        return command

    return decorate


def _resolved(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, eval_str=True)


def describe(name: str, function: Callable[..., None]) -> Command:
    """What a function takes and says about itself. Raises TypeError for a signature that no command line can fill."""
    summary, notes, examples, explained = _read_docstring(inspect.getdoc(function) or "")
    parameters = []
    for item in _resolved(function).parameters.values():
        if item.kind not in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY):
            raise TypeError(f"{name}: {item} cannot be filled from a command line")
        kind, choices = _values(item.annotation, f"{name}: {item}")
        required, positional = item.default is item.empty, item.kind is item.POSITIONAL_OR_KEYWORD
        default = None if required else item.default
        text = explained.get(item.name, "")
        parameters.append(Parameter(item.name, kind, choices, required, default, positional, text))
    return Command(name, function, tuple(parameters), summary, notes, examples)


def _values(annotation: Any, where: str) -> tuple[type | None, tuple[str, ...]]:
    """(the type that a value becomes, the words allowed as they are) of an annotation."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    choices = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    kinds = [part for part in parts if get_origin(part) is not Literal and part is not NoneType]
    if len(kinds) > 1 or not set(kinds) <= set(KINDS) or not (kinds or choices):
        raise TypeError(f"{where} cannot be filled from a command line")
    return kinds[0] if kinds else None, tuple(choices)


def _read_docstring(text: str) -> tuple[str, str, tuple[str, ...], dict[str, str]]:
    """(summary, notes, examples, {parameter: explanation}) of a docstring."""
    head, _, args = text.partition("\nArgs:\n")
    head, _, examples = head.partition("\nExamples:\n")
    summary, _, notes = head.partition("\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE)
    explained = {name: " ".join(explanation.split()) for name, explanation in found}
    lines = tuple(line.strip() for line in examples.splitlines() if line.strip())
    return summary.strip(), notes.strip(), lines, explained


def welcome(program: Program) -> str:
    """What the bare program says: what it is, what to type first, where to find the rest."""
    width = max(len(line) for line, _ in program.start)
    steps = [f"  {line:<{width}}  {why}" for line, why in program.start]
    return "\n".join(
        [f"{program.name} {program.version}: {program.summary}", *steps, f"{program.name} --help tells the rest"]
    )


def program_help(program: Program) -> str:
    """The help of the whole: what to type first, then the commands."""
    rows = [(name, program.command(name).summary) for name in program.commands]
    common = [
        ("--help, -h", "explain the program or a command"),
        ("--version", "print the version"),
        ("--debug", "show the traceback of an error"),
    ]
    blocks = [
        _wrap(f"{program.name} {program.version}: {program.summary}"),
        _table("Start here", list(program.start)),
        _table("Commands", rows),
        _table("Everywhere", common),
        f"{program.name} COMMAND --help explains a command.",
    ]
    return "\n\n".join(blocks)


def command_help(program: Program, name: str) -> str:
    """The help of one command: examples, usage, arguments and flags with their defaults."""
    command = program.command(name)
    rows = {True: [], False: [("--help, -h", "show this"), ("--debug", "show the traceback of an error")]}
    for item in reversed(command.parameters):
        row = (item.name.upper() if item.positional else _flag_label(item), _explanation(item))
        rows[item.positional].insert(0, row)
    blocks = [_wrap(f"{program.name} {name}: {command.summary}")]
    blocks += ["Examples\n" + textwrap.indent("\n".join(command.examples), "  ")] if command.examples else []
    blocks += [f"Usage\n  {program.name} {command.usage}"]
    blocks += [_wrap(block) for block in command.notes.split("\n\n") if block]
    blocks += [_table("Arguments", rows[True])] if rows[True] else []
    blocks += [_table("Flags", rows[False])]
    return "\n\n".join(blocks)


def _flag_label(item: Parameter) -> str:
    if item.kind is bool:
        return f"--no{item.name}" if item.default else item.flag
    return f"{item.flag} {item.placeholder}"


def _explanation(item: Parameter) -> str:
    choices = f"; also {' or '.join(item.choices)}" if item.choices and item.kind else ""
    default = "" if item.default is None or item.kind is bool else f" [{item.default}]"
    return f"{item.help}{choices}{default}"


def _width() -> int:
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def _wrap(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _width(), break_long_words=False, break_on_hyphens=False)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    column = min(42, _width() // 2, max(len(label) for label, _ in rows)) + 2
    lines = [title]
    for label, text in rows:
        wrapped = textwrap.wrap(text, max(20, _width() - column - 2), break_on_hyphens=False) or [""]
        if len(label) > column - 2:
            lines.append(f"  {label}")
            label = ""
        lines.append(f"  {label:<{column}}{wrapped[0]}".rstrip())
        lines += [" " * (column + 2) + line for line in wrapped[1:]]
    return "\n".join(lines)
