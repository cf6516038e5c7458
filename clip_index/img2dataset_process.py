"""img2dataset in a process of its own: `python -m clip_index.img2dataset_process`, its options a line of JSON on stdin.

1. It has a process group of its own, so that an interrupt is the parent's to handle; when stdin ends, because the
   parent has, the group is ended.
2. Workers import this file again, as `__mp_main__`: what it does at the top happens in each of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import types
import warnings

WITHOUT_WANDB = "CLIP_INDEX_WITHOUT_WANDB"
if __name__ in ("__main__", "__mp_main__"):
    warnings.simplefilter("ignore")
    # Each process would import these two, which take seconds and twice the memory, and use nothing of them: webdataset
    # imports torch where it can, img2dataset wandb whether it is asked to report or not.
    sys.modules["torch"] = None  # type: ignore[assignment]
    if os.environ.get(WITHOUT_WANDB):
        sys.modules["wandb"] = types.ModuleType("wandb")


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a thread that waits there holds a lock when the interpreter ends
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Download."""
    options = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from img2dataset import download

    download(**options)


if __name__ == "__main__":
    main()
