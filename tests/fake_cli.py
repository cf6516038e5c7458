"""The command line with the fake encoder, for tests that need processes: `python tests/fake_cli.py embed ...`.

`FAKE_PAUSE` is the time in seconds that it takes for a batch.
"""

from __future__ import annotations

import os
import sys

from fakes import FakeEncoder

from clip_index import embed_job

# spawned workers import this file too
embed_job.worker_encoder = lambda *_: FakeEncoder(pause=float(os.environ.get("FAKE_PAUSE", 0)))

if __name__ == "__main__":
    from clip_index.cli import main

    sys.exit(main(sys.argv[1:]))
