"""From a command line to an exit status: help anywhere, texts intact through fire, one line for each error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import Literal

import pytest

from clip_index import front_door
from clip_index.command import Program
from clip_index.types import ClipIndexError, IncompleteError, SampleError, UsageError

calls: list[dict] = []


def find(
    text: str | None = None,
    *,
    k: int = 10,
    rate: float = 0.5,
    kind: Literal["a", "b"] | None = None,
    json: bool = False,
) -> None:
    """Find things.

    Examples:
        tool find "a dog"
    """
    calls.append({"text": text, "k": k, "rate": rate, "kind": kind, "json": json})


def build_all(where: str) -> None:
    """Build."""
    calls.append({"where": where})


raised: list[BaseException] = []


def fail() -> None:
    """Fail."""
    raise raised[0]


TOOL = Program(
    "tool", "1.2.3", "a tool", (('tool find "a dog"', "try it"),), {"find": find, "build-all": build_all, "fail": fail}
)


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()
    raised.clear()


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = front_door.run(TOOL, list(argv))
    return status, *capsys.readouterr()


TEXTS = ["dog # cat", "a,b", "1984", "1e5", "None", "True", "{red}", "-night", "- snow", "it's \"quoted\"", "'",
         "back\\slash", "two\nlines", "🐕 犬", "key=value", "\udcff", "(1, 2)", "--", "$HOME"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_reach_the_function_as_typed(capsys, text):
    assert run(capsys, "find", "--", text) == (0, "", "")
    assert run(capsys, "find", f"--text={text}") == (0, "", "")
    assert [call["text"] for call in calls] == [text, text]


def test_values_reach_the_function_with_their_types(capsys):
    assert run(capsys, "find", "x", "--k=3", "--rate", "1e-7", "--kind", "b", "--json")[0] == 0
    assert calls == [{"text": "x", "k": 3, "rate": 1e-7, "kind": "b", "json": True}]


def test_command_names_take_dashes_or_underscores(capsys):
    assert run(capsys, "build-all", "x")[0] == run(capsys, "build_all", "x")[0] == 0
    assert len(calls) == 2


@pytest.mark.parametrize(
    "argv",
    [["find", "dog", "--indx", "foo"], ["find", "--k", "abc"], ["find", "a", "b"], ["build-all"], ["find", "--k"],
     ["fnd"], ["--k", "3", "find"], ["find", "--kind", "c"]],
)  # fmt: skip
def test_a_wrong_command_line_runs_nothing(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, out, calls) == (2, "", [])
    assert err.startswith("tool: ") and err.count("\n") == 1


def test_the_nearest_command_is_named(capsys):
    assert "did you mean tool find?" in run(capsys, "fnid")[2]
    assert "there are find, build-all, fail" in run(capsys, "xyzzy")[2]


@pytest.mark.parametrize(
    "argv",
    [["find", "--help"], ["find", "-h"], ["find", "dog", "--help"], ["--help", "find"], ["help", "find"],
     ["find", "--nonsense", "--help"], ["find", "--k", "-h"]],
)  # fmt: skip
def test_help_for_a_command_anywhere(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, err, calls) == (0, "", [])
    assert out.startswith("tool find: Find things.") and "--rate X" in out


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_for_the_program(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "") and "build-all  Build." in out


def test_help_for_an_unknown_command(capsys):
    assert run(capsys, "help", "fnd")[0] == run(capsys, "fnd", "--help")[0] == 2


@pytest.mark.parametrize("argv", [["--version"], ["find", "dog", "--version"]])
def test_version_anywhere(capsys, argv):
    assert run(capsys, *argv) == (0, "tool 1.2.3\n", "")
    assert calls == []


def test_help_after_two_dashes_is_a_text(capsys):
    assert run(capsys, "find", "--", "--help")[0] == 0
    assert calls[0]["text"] == "--help"


def test_nothing_typed_shows_where_to_start(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "") and 'tool find "a dog"' in out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no such model"), 2, "no such model"),
        (ClipIndexError("a shard is\nmissing"), 1, "a shard is missing"),
        (IncompleteError("two tasks"), 3, "two tasks"),
        (SampleError("one picture"), 1, "one picture"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: no permission"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.npy"), 1, "a.npy: no such file or folder"),
        (OSError(errno.ENOSPC, "No space left on device", "o.npy"), 1, "o.npy: no space left; free some"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),
        (ValueError("odd"), 1, "internal error: ValueError: odd; run again with --debug"),
        (OSError("odd"), 1, "internal error: OSError: odd; run again with --debug"),
    ],
)
def test_an_error_is_one_line(capsys, error, status, line):
    raised.append(error)
    found, out, err = run(capsys, "fail")
    assert (found, out) == (status, "")
    assert err.startswith(f"tool: {line}") and err.count("\n") == 1


def test_debug_shows_the_traceback_and_then_the_line(capsys):
    raised.append(ClipIndexError("a shard is missing"))
    for argv in (["fail", "--debug"], ["--debug", "fail"]):
        status, _, err = run(capsys, *argv)
        assert status == 1 and "Traceback" in err and err.endswith("\ntool: a shard is missing\n")


def test_a_command_may_choose_its_exit_status(capsys):
    raised.append(SystemExit(front_door.FAILED_SAMPLES))
    assert run(capsys, "fail") == (3, "", "")


def python(code: str, *, stdout=subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)


WAITING = """
import sys, time
from clip_index import front_door
from clip_index.command import Program
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(front_door.run(Program("tool", "1", "", (), {"wait": wait}), ["wait"]))
"""


def test_control_c_ends_in_one_line():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WAITING], **pipes) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "tool: interrupted\n")
        assert process.returncode == 130


LONG = """
import sys
from clip_index import front_door
from clip_index.command import Program
def speak() -> None:
    for number in range(100_000):
        print(number)
sys.exit(front_door.run(Program("tool", "1", "", (), {"speak": speak}), ["speak"]))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        result = python(LONG, stdout=stdout, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full, as Linux has")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as stdout:
        result = python(LONG, stdout=stdout)
    assert result.returncode == 1
    assert result.stderr.startswith("tool: no space left") and result.stderr.count("\n") == 1
