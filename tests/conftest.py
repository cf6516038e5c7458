"""What holds for all tests."""

from __future__ import annotations

import signal

# a shell that starts a command in the background has it ignore Ctrl-C, and so would all processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
