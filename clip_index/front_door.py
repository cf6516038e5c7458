"""The strict front door before fire: a command line is checked in full before anything runs.

1. `--help`, `-h` and `--version` are answered wherever they stand, before anything heavy is imported.
2. The command is looked up, and each of its words and flags is checked against the function's signature (`arguments`).
3. fire calls the function. Values reach it as literals, because fire would make `None`, numbers, tuples and comments
   of bare texts.
4. Whatever goes wrong ends in one line on stderr and an exit status (`explain`).
"""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from clip_index.arguments import nearest, parse, reject

if TYPE_CHECKING:
    from clip_index.command import Command, Program

OK, FAILED, USAGE, FAILED_SAMPLES, INTERRUPTED = 0, 1, 2, 3, 130
_REASONS = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left; free some and run the command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.EISDIR: "this is a folder, expected a file",
    errno.ENOTDIR: "this is a file, expected a folder",
}


def run(program: Program, argv: list[str]) -> int:
    """Run a command line; returns the exit status. Errors become one line on stderr, with `--debug` the traceback."""
    head = _before_end(argv)
    debug = "--debug" in head
    argv = [word for word in head if word != "--debug"] + argv[len(head) :]
    try:
        status = _dispatch(program, argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except SystemExit as stop:
        _stdout_is_gone()
        return OK if stop.code is None else int(stop.code)
    except BaseException as error:
        if _stdout_is_gone() and isinstance(error, BrokenPipeError):
            return OK  # the reader, such as `head`, has all that it wanted
        if debug:
            traceback.print_exception(error)
        status, line = explain(error)
        print(f"{program.name}: {line}", file=sys.stderr)
        return status


def _before_end(argv: list[str]) -> list[str]:
    return argv[: argv.index("--")] if "--" in argv else argv


def _dispatch(program: Program, argv: list[str]) -> int:
    from clip_index.command import command_help, program_help, welcome

    head = _before_end(argv)
    if "--version" in head:
        print(f"{program.name} {program.version}")
        return OK
    if argv[:1] == ["help"] or "--help" in head or "-h" in head:
        names = [word for word in head if not word.startswith("-")][argv[:1] == ["help"] :]
        print(command_help(program, _find(program, names[0])) if names else program_help(program))
        return OK
    if not argv:
        print(welcome(program))
        return OK
    if argv[0].startswith("-"):
        reject(f"expected a command before {argv[0]!r}: {', '.join(program.commands)}")
    command = program.command(_find(program, argv[0]))
    _call(f"{program.name} {command.name}", command, parse(command, argv[1:]))
    return OK


def _find(program: Program, word: str) -> str:
    name = word.replace("_", "-")
    if name not in program.commands:
        guess = nearest(name, program.commands)
        hint = f"did you mean {program.name} {guess}?" if guess else f"there are {', '.join(program.commands)}"
        reject(f"unknown command {word!r}: {hint}")
    return name


def _call(name: str, command: Command, values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fire imports a module that Python 3.11 deprecates
        import fire

    fire.Fire(command.function, command=[f"--{key}={value!r}" for key, value in values.items()], name=name)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit status, one line) for an exception."""
    from clip_index.types import ClipIndexError, IncompleteError, UsageError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    message = " ".join(str(error).split())
    if isinstance(error, ClipIndexError):
        status = USAGE if isinstance(error, UsageError) else FAILED
        return (FAILED_SAMPLES if isinstance(error, IncompleteError) else status), message
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED, f"out of memory{': ' if message else ''}{message}"
    if isinstance(error, OSError) and (error.strerror or error.filename):
        where = f"{error.filename}: " if error.filename else ""
        return FAILED, f"{where}{_REASONS.get(error.errno or 0, error.strerror)}"
    return FAILED, f"internal error: {type(error).__name__}: {message}; run again with --debug"


def _stdout_is_gone() -> bool:
    """Whether stdout takes no more; if so, what is left in its buffer goes nowhere, also at the interpreter's exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):  # closed, or a stand-in without a file
        return False
    try:
        sys.stdout.flush()
        gone = _has_no_reader(descriptor)
    except OSError:
        gone = True
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def _has_no_reader(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed; an unbuffered stream fails once and flushes well afterwards."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
