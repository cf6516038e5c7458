from __future__ import annotations

import pytest

from clip_index import rates
from clip_index.plan import format_plan, parse_size, plan
from clip_index.rates import Rates
from clip_index.types import UsageError

RATES = Rates(
    trained=1e8, assigned=2e8, encoded=2e5, compared=2e8, query_s=1e-3, list_s=1e-5, search_s=1e-3, hashed=1e9
)


def test_sizes_as_people_write_them():
    assert parse_size("1000000000x768") == (10**9, 768)
    assert parse_size("1_000_000x512") == (10**6, 512)
    for wrong in ("", "x", "10", "10x", "0x4", "10x0", "-1x2", "1e6x512", "10 x 4"):
        with pytest.raises(UsageError, match="ROWSxDIMENSIONS"):
            parse_size(wrong)


def test_bytes_by_hand():
    planned = plan(1_000_000, 512, 4 << 30, RATES)
    assert (planned["family"], planned["parts"], planned["training_rows"]) == ("IVF4096,RaBitQ", 1, 32 * 4096)
    # 512 bits, two floats; centroids of float16; a rotation of float32
    assert planned["memory_bytes_per_part"] == 72 * 10**6 + 4096 * 1024 + 512 * 512 * 4
    assert planned["memory_bytes_per_vector"] < 80
    assert planned["disk_bytes_per_part"] == planned["memory_bytes_per_part"] + 10**6 * (1024 + 12)
    # by hand: sixteen bytes a row; 14 times 4,096 centroids and two rotations of float32; three samples of float32
    held = 16 * 10**6 + 14 * 4096 * 2048 + 2 * 512 * 2048 + 3 * 131072 * 2048
    assert planned["build_bytes_per_part"] == held


def test_seconds_by_hand():
    seconds = plan(1_000_000, 512, 4 << 30, RATES)["seconds"]
    compared = 64 + 1.6 * 6 * 64  # centroids: 64 groups, and the members of six, which are larger than others
    assert seconds["add"] == pytest.approx(1e6 * compared / 2e8)
    # 32 rows a list: with 64 groups, in six iterations with the 64 lists of a group, in three with those of six groups
    assert seconds["train"] == pytest.approx(32 * 4096 * (64 + 6 * 64 + 3 * compared) / 1e8)
    assert seconds["write"] == pytest.approx(1e6 / 2e5)
    assert seconds["exact search"] == pytest.approx(2000 * 1e6 / 2e8)
    # 1,000 queries look into 4 to 64 lists in eight steps, then into 96 and 128
    assert seconds["tune"] == pytest.approx(
        1000 * (10 * 1e-3 + (4 + 8 + 12 + 16 + 24 + 32 + 48 + 64 + 96 + 128) * 1e-5)
    )
    assert seconds["measure"] == pytest.approx(2.5)
    assert seconds["commit"] == pytest.approx((72 * 10**6 + 4096 * 1024 + 2**20 + 1036 * 10**6) / 1e9)


def test_memory_bounds_the_sample_and_not_the_rows():
    tight = plan(10**8, 512, 10 << 30, RATES)
    assert tight["parts"] == 1 and tight["build_bytes_per_part"] <= 0.8 * (10 << 30)
    assert tight["memory_bytes_per_part"] <= 0.8 * (10 << 30)


def test_a_thousand_million_rows_are_split():
    planned = plan(10**9, 768, 64 << 30, RATES)
    assert planned["parts"] == planned["machines"] > 1
    assert planned["parts"] * planned["rows_per_part"] >= 10**9
    assert planned["build_bytes_per_part"] <= 0.8 * (64 << 30)
    assert plan(10**9, 768, 640 << 30, RATES)["parts"] == 1
    assert "for all parts on one machine" in format_plan(planned)


def test_few_rows_are_searched_exactly():
    planned = plan(5000, 512, 1 << 30, RATES)
    assert (planned["family"], planned["memory_bytes_per_vector"], planned["training_rows"]) == ("SQfp16", 1024, 0)
    assert "SQfp16" in format_plan(planned)


def test_rates_are_those_of_a_machine(monkeypatch):
    monkeypatch.setattr(rates, "_ROWS", 4096)
    monkeypatch.setattr(rates, "_LISTS", 256)
    monkeypatch.setattr(rates, "_QUERIES", 200)
    found = rates.measure_rates(32)
    assert 1e4 < found.trained < 1e12 and 1e4 < found.assigned < 1e12
    assert 1e3 < found.encoded < 1e9
    assert 1e5 < found.compared < 1e13
    assert 0 <= found.query_s < 1 and 0 <= found.list_s < 1 and 0 < found.search_s < 1
    assert 1e5 < found.hashed < 1e12
