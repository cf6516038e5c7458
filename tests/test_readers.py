from __future__ import annotations

import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import bucket  # noqa: F401 - a fixture

from clip_index import storage
from clip_index.readers import READERS, fetch, open_reader
from clip_index.readers.files import FilesReader
from clip_index.readers.parquet import ParquetReader
from clip_index.readers.webdataset import WebdatasetReader
from clip_index.types import ClipIndexError, UsageError


def make(path):
    """A small source of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".tar":
        picture = path.parent / "0.jpg"
        picture.write_bytes(b"x")
        with tarfile.open(path, "w") as tar:
            tar.add(picture, "0.jpg")
        picture.unlink()
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"jpg": [b"x"]}), path)
    else:
        path.write_bytes(b"x")
    return str(path)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg"], FilesReader),
        (["sub/a.PNG", "notes.txt", "a.json"], FilesReader),
        (["a.txt"], FilesReader),
        (["0.tar"], WebdatasetReader),
        (["0.tar", "0.parquet", "0_stats.json"], WebdatasetReader),
        (["deep/er/0.tar", "README.txt"], WebdatasetReader),
        (["0.parquet", "README.txt"], ParquetReader),
        (["0.parquet", "0_stats.json"], ParquetReader),
        (["0.parquet", "0_stats.json", "0/0.jpg", "0/0.txt", "0/0.json"], FilesReader),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__,
)
def test_auto_looks_into_a_folder(tmp_path, names, kind):
    for name in names:
        make(tmp_path / "source" / name)
    assert type(open_reader(str(tmp_path / "source"))) is kind


def test_auto_takes_a_file_or_a_pattern_by_its_end(tmp_path):
    for name in ("0.tar", "1.TAR", "t.parquet", "a.JPG", "a.txt"):
        make(tmp_path / name)
    assert type(open_reader(tmp_path / "0.tar")) is WebdatasetReader
    assert type(open_reader(f"{tmp_path}/1.TAR")) is WebdatasetReader
    assert type(open_reader(f"{tmp_path}/{{0..0}}.tar")) is WebdatasetReader
    assert type(open_reader(f"{tmp_path}/*.parquet")) is ParquetReader
    assert type(open_reader(f"{tmp_path}/a.JPG")) is FilesReader
    assert open_reader(f"{tmp_path}/a.txt").modalities == ("text",)


@pytest.mark.parametrize("head", ["", "deep/out/"], ids=["beside", "below"])
@pytest.mark.parametrize("name", ["a.jpg", "in.parquet", "0.tar"])
def test_what_a_run_wrote_into_its_source_is_not_read(tmp_path, head, name):
    make(tmp_path / name)
    before = open_reader(str(tmp_path))
    tasks = before.plan(10)
    for output in ("embeddings/metadata/metadata_00000.parquet", "embeddings/failed/failed_00000.parquet"):
        make(tmp_path / head / output)
    make(tmp_path / head / "embeddings" / "done" / "00000.json")
    make(tmp_path / head / "embeddings" / "manifest.json")
    make(tmp_path / head / "index" / "metadata" / "metadata_00000.parquet")
    make(tmp_path / head / "index" / "clip_index.json")
    after = open_reader(str(tmp_path))
    assert after == before and after.plan(10) == tasks
    make(tmp_path / "more" / "metadata" / "t.parquet")
    make(tmp_path / "more" / "manifest.json")
    if name == "in.parquet":
        assert len(open_reader(str(tmp_path)).plan(1)) == 2


def test_a_folder_may_be_named_like_a_file(tmp_path):
    make(tmp_path / "table.parquet" / "part-0.parquet")
    make(tmp_path / "album.tar" / "a.jpg")
    make(tmp_path / "what[1]{x}" / "a[1].jpg")
    assert type(open_reader(f"{tmp_path}/table.parquet")) is ParquetReader
    assert type(open_reader(f"{tmp_path}/album.tar")) is FilesReader
    assert type(open_reader(f"{tmp_path}/what[1]{{x}}")) is FilesReader
    assert type(open_reader(f"{tmp_path}/what[1]{{x}}/a[1].jpg")) is FilesReader


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "nothing to read in .*: no pictures, captions"),
        (["a.json", "b.csv"], "nothing to read in"),
        (
            ["0.tar", "1.tar", "a.jpg"],
            "holds 2 tars, 1 picture: say which .* --input_format webdataset or files",
        ),
        (["t.parquet", "a.jpg"], "holds 1 parquet file, 1 picture: .* parquet or files"),
        (["0.tar.gz", "1.tgz"], "compressed tars cannot be read in part; uncompress them first"),
    ],
    ids=["empty", "other files", "tars and pictures", "tables and pictures", "compressed"],
)
def test_auto_says_what_it_found_where_it_cannot_tell(tmp_path, names, message):
    (tmp_path / "source").mkdir()
    for name in names:
        make(tmp_path / "source" / name)
    with pytest.raises(UsageError, match=message):
        open_reader(str(tmp_path / "source"))


def test_a_mixed_folder_is_read_as_one_says(tmp_path):
    make(tmp_path / "0.tar")
    make(tmp_path / "a.jpg")
    for input_format, kind in (("files", FilesReader), ("webdataset", WebdatasetReader)):
        assert type(open_reader(str(tmp_path), input_format=input_format)) is kind


def test_sources_that_cannot_be_told_are_refused(tmp_path):
    for source, message in [
        (tmp_path / "none", "no such file or folder: .*none"),
        (tmp_path / "none.tar", "no such file or folder: .*none.tar"),
        (make(tmp_path / "data.bin"), "cannot tell what .*data.bin is: give --input_format"),
        (make(tmp_path / "x.tar.gz"), "compressed tars"),
        (tmp_path / "*.jpg", "end the pattern in .tar or .parquet"),
        (f"{tmp_path}/{{0..3}}", "end the pattern in .tar or .parquet"),
        ("memory://nothing/here", "no such file or folder: memory://nothing/here"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_reader(source)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ClipIndexError, match="cannot open nope://x"):
        open_reader("nope://x")


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "PIPE: cat x", " pipe:curl -s http://x/{0..3}.tar"])
@pytest.mark.parametrize("input_format", ["auto", *READERS])
def test_commands_are_refused(source, input_format):
    with pytest.raises(UsageError, match="commands are never run"):
        open_reader(source, input_format=input_format)


def test_wrong_arguments_are_refused(tmp_path):
    source = make(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="unknown input_format 'tar': choose auto, files, webdataset, parquet"):
        open_reader(source, input_format="tar")
    with pytest.raises(UsageError, match="unknown modality 'images': choose auto, image, text or image,text"):
        open_reader(source, modality="images")
    with pytest.raises(UsageError, match=r"image_column: .*read as files"):
        open_reader(source, image_column="jpg", caption_column=None)
    assert open_reader(source, image_column=None).modalities == ("image",)


def test_fetch_says_what_it_could_not_read(tmp_path):
    with pytest.raises(ClipIndexError, match=r"cannot read .*gone.jpg: No such file"):
        fetch(f"{tmp_path}/gone.jpg")
    with pytest.raises(ClipIndexError, match=r"cannot read .*gone.tar#0.10: No such file"):
        fetch(f"{tmp_path}/gone.tar#0+10")


def test_fetch_reads_a_file_whose_name_looks_like_a_cell(tmp_path):
    (tmp_path / "a#row=x.jpg").write_bytes(b"x")
    assert fetch(f"{tmp_path}/a#row=x.jpg") == b"x"


def test_readers_decode_nothing(tmp_path):
    make(tmp_path / "files" / "a.jpg")
    make(tmp_path / "tars" / "0.tar")
    make(tmp_path / "tables" / "0.parquet")
    code = """
import sys
from clip_index.readers import open_reader
for name in sys.argv[2:]:
    reader = open_reader(f"{sys.argv[1]}/{name}")
    assert sum(1 for task in reader.plan(10) for sample in reader.read(task) if sample.image) == 1
    print(name, sorted(sys.modules.keys() & {"torch", "PIL", "numpy", "pyarrow", "faiss", "pandas"}))
"""
    command = [sys.executable, "-c", code, str(tmp_path), "files", "tars", "tables"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:2] == ["files ['numpy']", "tars ['numpy']"]
    assert not {"torch", "PIL", "faiss"} & set(lines[2].split("'"))


def test_every_format_is_read_from_an_object_store(bucket, tmp_path):  # noqa: F811
    for name in ("files/sub/a.jpg", "files/sub/b.jpg", "tars/0.tar", "tars/1.tar", "tables/0.parquet"):
        storage.write_bytes(f"{bucket}/{name}", storage.read_bytes(make(tmp_path / name)))
    storage.write_bytes(f"{bucket}/files/empty.jpg", b"")
    storage.write_bytes(f"{bucket}/tars/2.tar", storage.read_bytes(f"{bucket}/tars/0.tar")[:512])
    sources = {"files": ["empty.jpg", "sub/a.jpg", "sub/b.jpg"], "files/sub/a.jpg": ["a.jpg"]}
    sources |= {"tars": ["0/0", "1/0", "2#damaged"], "tars/{1,0}.tar": ["1/0", "0/0"], "tars/[01].tar": ["0/0", "1/0"]}
    sources |= {"tables": ["0/0"], "tables/0.parquet": ["0/0"]}
    for source, keys in sources.items():
        reader = open_reader(f"{bucket}/{source}")
        samples = [sample for task in reader.plan(10) for sample in reader.read(task)]
        assert [sample.key for sample in samples] == keys
        good = [sample for sample in samples if sample.error is None]
        assert len(good) == len([key for key in keys if key not in ("empty.jpg", "2#damaged")])
        assert all(sample.image == fetch(sample.source) == b"x" for sample in good)
    with pytest.raises(UsageError, match="no such file or folder: s3://bucket/nothing"):
        open_reader(f"{bucket}/nothing")


def test_a_remote_folder_is_looked_into(tmp_path):
    storage.write_bytes("memory://test_readers/x/0.tar", storage.read_bytes(make(tmp_path / "0.tar")))
    assert type(open_reader("memory://test_readers")) is WebdatasetReader
