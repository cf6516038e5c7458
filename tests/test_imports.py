"""The architecture as a table: which room may import which, checked on the syntax tree, and what stays unloaded.

A module at the top of the package belongs to a room; those in a folder belong to the folder's. `top` is what a room may
import when it is loaded, `late` what it may import inside functions besides. All other rooms and packages are refused.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import clip_index

PACKAGE = Path(clip_index.__file__).parent


class Room(NamedTuple):
    modules: str
    top: str
    late: str = ""


ROOMS = {
    "types": Room("types _version", top="numpy"),
    "storage": Room("storage remote listing spool", top="types", late="fsspec braceexpand"),
    "locations": Room("locations", top="types storage"),
    "store": Room("store markers shard_writer verify columns", top="types storage numpy", late="pyarrow"),
    "readers": Room("readers", top="types storage", late="pyarrow"),
    "preprocess": Room("preprocess decode", top="types numpy PIL simplejpeg", late="torch"),
    "clip": Room(
        "clip",
        top="types storage locations preprocess numpy torch",
        late="safetensors huggingface_hub ftfy regex tokenizers onnx onnxruntime",
    ),
    "sample": Room("sample_pairs", top=""),
    "encoders": Room(
        "encoders",
        top="types preprocess clip sample numpy torch safetensors tokenizers",
        late="open_clip transformers",
    ),
    "gates": Room("gates", top="types sample numpy", late="encoders preprocess PIL"),
    "executors": Room("executors cluster", top="types"),
    "spark": Room("spark", top="types executors", late="pyspark py4j pyarrow"),
    "embed": Room(
        "embed embed_job embed_plan embed_preview progress",
        top="types storage store readers executors spark numpy",
        late="encoders torch tqdm",
    ),
    "index": Room(
        "index index_folder index_writer families partition two_stage two_stage_build inverted_file opened points "
        "measure plan rates source speed steps metadata vectors recall report autofaiss_compat selection conditions "
        "matrix duplicates regrow",
        top="types storage locations store numpy",
        late="faiss autofaiss embedding_reader pyarrow duckdb",
    ),
    "search": Room(
        "search query_vectors expression given_image distinct narrow exhaustive",
        top="types storage locations store index numpy",
        late="encoders faiss PIL torch",
    ),
    "life": Room(
        "copies duplicate_lists exports upkeep",
        top="types storage locations store index search numpy",
        late="faiss pyarrow lance pymilvus qdrant_client",
    ),
    "download": Room(
        "downloads download_options download_folder url_lists url_tables img2dataset_process",
        top="types storage",
        late="pyarrow img2dataset",
    ),
    "show": Room("render terminal sheet thumbnails", top="types storage", late="preprocess PIL"),
    "cli": Room(
        "__init__ __main__ cli build download download_report end2end query filter dedup change "
        "convert export embed_report command arguments front_door console",
        top="_version download_options",
        late="types storage locations store readers clip encoders gates embed index search life download show "
        "demo fire",
    ),
    "demo": Room("demo", top="cli storage show", late="readers embed index search"),
}
HOMES = {module: room for room, (modules, *_) in ROOMS.items() for module in modules.split()}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether only when a function runs) of a source; imports for type checkers are left out."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                in_package = child.module == "clip_index"
                names = [f"clip_index.{alias.name}" for alias in child.names] if in_package else [child.module]
                yield from ((name, late) for name in names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            else:
                yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return visit(ast.parse(source), False)


def refused(module: str, source: str) -> list[str]:
    """The imports of a module that its room does not allow."""
    room = HOMES[module.split(".")[0]]
    top, late = set(ROOMS[room].top.split()), set(ROOMS[room].late.split())
    found = []
    for name, in_function in imports(source):
        parts = name.split(".")
        if parts[0] == "clip_index":
            home = parts[1] if len(parts) > 1 else "__init__"
            wanted = HOMES.get(home, "cli")  # a name that is not a module comes from the package itself
            if wanted == room or home in top:
                continue
        elif parts[0] in sys.stdlib_module_names:
            continue
        else:
            wanted = parts[0]
        if wanted not in (top | late if in_function else top):
            found.append(f"{module} imports {name}{'' if in_function else ' when it is loaded'}")
    return found


MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_room_allows(module):
    assert module.split(".")[0] in HOMES, f"{module} has no room: give it one in this table"
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert refused(module, source) == []


def test_every_room_has_its_modules():
    assert set(HOMES) == {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("readers.files", "import torch"),
        ("readers.files", "def f():\n    from PIL import Image"),
        ("readers.files", "from clip_index.store import Manifest"),
        ("types", "from clip_index import storage"),
        ("store", "import faiss"),
        ("store", "import pyarrow"),
        ("cli", "from clip_index.types import Hit"),
        ("cli", "class A:\n    import numpy"),
        ("executors", "try:\n    import pyspark\nexcept ImportError:\n    pass"),
        ("search", "def f():\n    import clip_index.readers.files"),
        ("index", "from clip_index import Searcher"),
        ("embed", "async def f():\n    import faiss"),
        ("__init__", "import torch"),
    ],
)
def test_what_a_room_does_not_allow_is_found(module, source):
    assert len(refused(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("store", "def f():\n    import pyarrow.parquet as pq"),
        ("readers.files", "from clip_index.readers import sources\nfrom clip_index import storage, types"),
        ("cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from clip_index.types import Hit"),
        ("cli", "from clip_index._version import __version__"),
    ],
)
def test_what_a_room_allows_is_not_found(module, source):
    assert refused(module, source) == []


HEAVY = {"torch", "faiss", "pyarrow", "pyspark", "pandas", "PIL", "autofaiss"}
HELP = """
import contextlib, io
from clip_index.cli import PROGRAM, main
with contextlib.redirect_stdout(io.StringIO()) as said:
    for argv in [], ["--help"], ["--version"], *([name, "--help"] for name in PROGRAM.commands):
        assert main(argv) == 0
assert said.getvalue().count("Usage") == len(PROGRAM.commands)
"""


@pytest.mark.parametrize(
    ("code", "unloaded"),
    [
        ("import clip_index", {*HEAVY, "numpy", "fire", "fsspec"}),
        (HELP, {*HEAVY, "numpy", "fire", "fsspec"}),
        ("import clip_index.readers.files, clip_index.readers.webdataset, clip_index.readers.parquet", HEAVY),
        ("import clip_index.store, clip_index.executors", HEAVY),
        ("from clip_index.encoders import list_models; list_models()", HEAVY),
        ("import clip_index.index", {"torch", "PIL"}),
        ("import clip_index.search", {"torch", "PIL"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(code, unloaded):
    report = f"{code}\nimport sys\nprint(*sorted(set(sys.modules) & {unloaded!r}))"
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_the_package_gives_its_names_when_they_are_asked_for():
    from clip_index.search import Searcher

    assert clip_index.Searcher is Searcher
    assert {"Searcher", "build_index", "load_encoder"} <= set(dir(clip_index)) and "Searcher" in clip_index.__all__
    with pytest.raises(AttributeError, match="no attribute 'searcher'"):
        _ = clip_index.searcher
