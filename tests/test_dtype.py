"""A precision on a CPU is judged by what was measured on it."""

import time

import pytest

import model


def noted(dtype, fp32, bf16):
    lines = []
    model.note_rates(dtype, {"fp32": fp32, "bf16": bf16}, lines.append)
    return lines


def test_bf16_where_it_is_slow_is_told_with_the_way_out():
    (line,) = noted("bf16", 90.0, 0.9)
    assert line.startswith("--dtype bf16: 1e+02 times slower than fp32") and line.endswith("pass --dtype fp32")
    assert noted("bf16", 90.0, 300.0) == [] and noted("bf16", 90.0, 80.0) == []


@pytest.mark.parametrize(("bf16", "advised"), [(700.0, True), (100.0, False), (1.0, False)])
def test_the_default_says_what_both_reach(bf16, advised):
    (line,) = noted(None, 90.0, bf16)
    assert (
        "exact; a thread's matrix products reach 90 GFLOP/s in fp32" in line and ("bf16 is faster" in line) == advised
    )


def test_a_precision_that_is_asked_for_and_fast_enough_needs_no_line():
    assert noted("fp32", 90.0, 700.0) == [] and noted("fp16", 90.0, 1.0) == []


def test_the_measurement_stops_after_one_product_of_a_slow_processor(monkeypatch):
    clock = iter(range(1000))  # a second passes between two looks
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert model.product_rate("fp32") == pytest.approx(2 * 64 * 512 * 512 / 1e9)
    assert next(clock) == 2
