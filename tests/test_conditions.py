from __future__ import annotations

import numpy as np
import pytest
from embedding_fakes import make_embeddings, metadata_rows, random_rows

from clip_index.conditions import matching_rows
from clip_index.metadata import Metadata, write_metadata
from clip_index.types import UsageError

ROWS = [
    {
        **row,
        "width": 10 * number,
        "caption": "a red 'dog'" if number % 3 else None,
        "score": None if number % 5 else number / 7,
    }
    for number, row in enumerate(metadata_rows(0, 200))
]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    manifest = make_embeddings(folder / "e", {"image": random_rows(200)}, rows=ROWS)
    write_metadata(str(folder / "e"), manifest, str(folder / "metadata.arrow"))
    return Metadata(str(folder / "metadata.arrow"))


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("width >= 512 and caption like '%red%'", lambda row: row["width"] >= 512 and "red" in (row["caption"] or "")),
        ("caption is null -- or true", lambda row: row["caption"] is None),
        ("not (caption like '%red%')", lambda row: False),  # null is neither red nor not red
        ("score > 3", lambda row: row["score"] is not None and row["score"] > 3),
        ("key in ('key-3', 'key-77')", lambda row: row["key"] in ("key-3", "key-77")),
        ("caption = 'a red ''dog'''", lambda row: row["caption"] is not None),
        ("width = (select max(width) from metadata)", lambda row: row["width"] == 1990),
        ("false", lambda row: False),
    ],
)
def test_the_rows_that_a_condition_holds_for(metadata, condition, holds):
    found = matching_rows(metadata, condition)
    assert found.dtype == bool
    assert found.tolist() == [holds(row) for row in ROWS]


def test_many_batches_keep_their_order(tmp_path, monkeypatch):
    from clip_index import metadata as module

    monkeypatch.setattr(module, "BATCH_ROWS", 1000)
    widths = np.random.default_rng(0).integers(0, 1000, 20_000)
    rows = [{"key": str(row), "width": int(width)} for row, width in enumerate(widths)]
    manifest = make_embeddings(tmp_path, {"image": random_rows(20_000, dim=2)}, rows=rows)
    write_metadata(str(tmp_path), manifest, str(tmp_path / "metadata.arrow"))
    found = matching_rows(Metadata(str(tmp_path / "metadata.arrow")), "width < 300")
    np.testing.assert_array_equal(found, widths < 300)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("widht > 3", '"widht" not found'),
        ("width >", "syntax error"),
        (" ", "it is empty"),
        ("caption", "is not a condition"),
        ("true), (true", "is not a condition"),
        ("width = 'abc'", "Could not convert"),
        ("count(*) > 1", "yes or no to each row"),
        ("true) from metadata; drop view metadata; --", "syntax error"),
        ("true\n) from metadata; select (true", "more than one statement"),
        ("(select count(*) from read_text('README.md')) > 0", "disabled by configuration"),
        ("exists (select 1 from 'README.md')", "does not exist"),
        ("exists (select 1 from condition)", "does not exist"),
    ],
)
def test_what_is_not_a_condition_is_refused_in_one_line(metadata, condition, says):
    with pytest.raises(UsageError) as refused:
        matching_rows(metadata, condition)
    message = str(refused.value)
    assert says in message
    assert message.startswith("--where ") and "\n" not in message
    assert message.endswith("the columns are image_path, caption, key, source, width, height, score")
