"""Every command and every flag is explained, and every command line in the documentation is one that is accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clip_index.arguments import parse
from clip_index.cli import PROGRAM
from clip_index.command import command_help

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [PROGRAM.command(name) for name in PROGRAM.commands]


def command_lines(text: str) -> list[list[str]]:
    """The words of every clip-index command line in a text, without comments, pipes and redirections."""
    found = []
    for line in re.findall(r"^\s*(?:\$ )?(clip-index .*)$", text.replace("\\\n", " "), re.MULTILINE):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|><;&")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set("|><;&"):
                break
            words.append(word)
        found.append(words[1:])
    return found


def check(words: list[str]) -> None:
    if words[0].startswith("-") or words[0] == "help" or "--help" in words:
        return
    assert words[0] in PROGRAM.commands, f"there is no command {words[0]}"
    parse(PROGRAM.command(words[0]), words[1:])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_is_explained(command):
    assert command.summary.endswith(".") and len(command.summary) <= 90
    assert command.examples
    for parameter in command.parameters:
        assert parameter.help, f"{command.name} does not explain {parameter.name}"
        assert parameter.help in " ".join(command_help(PROGRAM, command.name).split())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_are_accepted(command):
    for words in command_lines("\n".join(command.examples)):
        assert words[0] == command.name
        check(words)


def test_where_to_start_is_accepted():
    for line, _ in PROGRAM.start:
        for words in command_lines(line):
            check(words)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_readme_has_the_command(command):
    assert f"`clip-index {command.name}" in README


def test_command_lines_of_the_readme_are_accepted():
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = command_lines("\n".join(blocks))
    assert lines
    for words in lines:
        check(words)


def test_a_wrong_command_line_would_be_found():
    assert command_lines('clip-index query "a # dog" --k 3 --json | jq . > x  # comment') == [
        ["query", "a # dog", "--k", "3", "--json"]
    ]
    with pytest.raises(Exception, match="did you mean `--json`"):
        check(["query", "a dog", "--jsn"])
    with pytest.raises(AssertionError, match="no command"):
        check(["search", "a dog"])
