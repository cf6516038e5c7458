from __future__ import annotations

import json

import numpy as np
import pytest
from embedding_fakes import make_embeddings, random_rows
from test_plan import RATES

from clip_index import plan
from clip_index.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *argv):
    status = main([str(word) for word in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_plan_builds_nothing(capsys, monkeypatch):
    monkeypatch.setattr(plan, "measure_rates", lambda dim, rows_per_list: RATES)
    status, out, err = run(capsys, "build-index", "--plan", "1000000000x768", "--memory", "64G")
    assert (status, err) == (0, "")
    assert "1,000,000,000 rows of 768 dimensions" in out and "machines" in out
    status, out, err = run(capsys, "build-index", "--plan", "1000000x512", "--json")
    assert (status, err, json.loads(out)["family"]) == (0, "", "IVF4096,RaBitQ")


def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path):
    for argv in ([], [tmp_path], [tmp_path, tmp_path, "--plan", "10x10"], ["--plan", "many"]):
        status, out, err = run(capsys, "build-index", *argv)
        assert (status, out) == (2, "") and err.count("\n") == 1, argv


def test_one_modality_and_a_folder_of_another_program(capsys, tmp_path):
    make_embeddings(tmp_path / "e", {"image": random_rows(30), "text": random_rows(30, seed=1)})
    status, out, _ = run(capsys, "build-index", tmp_path / "e", tmp_path / "i", "--modality", "text", "--json")
    assert status == 0 and list(json.loads(out)["indices"]) == ["text"]
    assert set(json.loads(out)["indices"]["text"]["recall"]) == {"image", "text"}
    np.save(tmp_path / "rows.npy", random_rows(30))
    status, out, _ = run(capsys, "build-index", tmp_path, tmp_path / "j", "--model", "any/name")
    assert status == 0 and "encoder any/name" in out
