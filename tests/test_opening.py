"""What opening an index and a first search read: bytes and modules, not seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from embedding_fakes import make_embeddings, random_rows

from clip_index.index import build_index

ROWS, DIM = 20_000, 128

OPEN = """
import sys
import faiss, pyarrow
import numpy as np
from clip_index.search import Searcher

def read():
    with open("/proc/self/io") as file:
        return dict((name, int(count)) for name, count in (line.split(":") for line in file))["rchar"]

def mapped():
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                inside = sys.argv[1] in line
            elif inside and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total

Searcher(sys.argv[1])
held = mapped()
before = read()
searcher = Searcher(sys.argv[1])
print(read() - before, mapped() - held)  # in this order: reading the maps counts too
searcher.search(vector=np.ones(128))
print(*sorted({"pyarrow.compute", "pandas", "torch", "PIL", "duckdb"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("opening")
    make_embeddings(made / "e", {"image": random_rows(ROWS, DIM)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made / "cache"))
        build_index(str(made / "e"), str(made / "i"), index_key="IVF64,RaBitQ", queries=5)
    return str(made / "i")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="only Linux says what a process has read")
def test_what_is_not_needed_is_not_read(folder):
    done = subprocess.run([sys.executable, "-c", OPEN, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, modules = done.stdout.splitlines()
    read, mapped = map(int, opened.split())
    sizes = {name: os.path.getsize(f"{folder}/{name}") for name in os.listdir(folder)}
    assert sizes["image.vectors.npy"] > 2 * ROWS * DIM
    # the marker, the quantizer and the head of each file; the system maps pages around those that are touched
    assert read < 50_000
    assert mapped < sum(sizes.values()) / 5
    assert modules == ""


def test_the_row_numbers_are_not_read_in_before_they_are_needed(folder):
    from clip_index.search import Searcher

    searcher = Searcher(folder)
    searcher.search(vector=np.ones(DIM))
    assert searcher._index("image")._places is None
    searcher.search(vector=np.ones(DIM), embeddings=True)
    assert searcher._index("image")._places is not None
