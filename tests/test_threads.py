"""The number of threads follows the cores that other programs leave free."""

import itertools

import pytest
import torch

import threads
from threads import Usage, fitting_threads, following_load


@pytest.mark.parametrize(
    ("cores", "others", "most", "expected"),
    [
        (2, 0.0, 2, 2),  # nobody else
        (2, 0.2, 2, 2),  # a process of the lowest priority, and what a system does by itself
        (2, 0.67, 2, 1),  # a busy process that shares two cores with two threads
        (2, 1.0, 2, 1),
        (2, 3.0, 2, 1),
        (16, 1.0, 8, 8),  # room enough
        (16, 10.0, 8, 6),
        (2, -0.1, 2, 2),  # the clocks of the system and of the process round differently
    ],
)
def test_threads_give_way_to_busy_processes(cores, others, most, expected):
    before, now = Usage(0.0, 100.0, 50.0), Usage(2.0, 104.0 + 2 * others, 54.0)
    assert fitting_threads(most, cores, before, now) == expected


def test_generation_follows_the_load_and_puts_the_number_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "last_look", Usage(0.0, 0.0, 0.0))
    looks = iter([Usage(1.0, 3.0, 1.0), Usage(2.0, 4.0, 2.0)])  # 2 cores by others, then none
    clock = itertools.count()
    monkeypatch.setattr(threads, "usage", lambda: next(looks))
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda: 3)
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    try:
        torch.set_num_threads(3)
        with following_load(torch.device("cpu")) as follow:
            seen = []
            assert torch.get_num_threads() == 1  # before the first step, which may be long
            for _ in range(2):
                follow()
                seen.append(torch.get_num_threads())
        assert seen == [1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_number_of_threads_that_was_asked_for_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "last_look", Usage(-10.0, 0.0, 0.0))
    with following_load(torch.device("cpu")) as follow:
        before = torch.get_num_threads()
        follow()
        assert torch.get_num_threads() == before
