from __future__ import annotations

import pytest

from clip_index.plan import Rates, format_plan, measure_rates, parse_size, plan
from clip_index.types import UsageError

RATES = Rates(flops=1e11, encoded=1e8, written=1e9)


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
    # 1,000,000 rows of 1,108 bytes at 1 GB/s; 2,000 queries of 512 multiplications and additions with each row
    assert planned["seconds"]["write"] == pytest.approx(1.108)
    assert planned["seconds"]["measure"] == pytest.approx(2 * 2000 * 512 * 1e6 / 1e11)


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


def test_rates_are_those_of_a_machine():
    rates = measure_rates(32)
    assert 1e7 < rates.flops < 1e14
    assert 1e5 < rates.encoded < 1e12
    assert 1e6 < rates.written < 1e12
