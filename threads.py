"""How many threads compute on a CPU that other programs use too.

OpenMP's threads wait for one another after every product. Where another program takes the core of one of them, all
wait, and two threads are slower than one. So the number of threads follows the cores that others leave free.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import torch

LOOK_EVERY = 0.5  # seconds
SHORTEST_LOOK = 0.1  # seconds: the system counts in hundredths
SLACK = 0.25  # cores that others may use before a thread gives way


class Usage(NamedTuple):
    """Seconds: of the clock, of all cores in use by anyone, and of cores in use by this process."""

    clock: float
    everyone: float
    own: float


def usage() -> Usage:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # of virtual machines, in `user` already
    return Usage(time.monotonic(), sum(times) - idle - twice, time.process_time())


last_look = usage()  # on import, so that the first step knows what others used while the model was loaded


def fitting_threads(most: int, cores: int, before: Usage, now: Usage) -> int:
    """How many of at most `most` threads find a core, by what other programs used between two looks."""
    others = (now.everyone - before.everyone - (now.own - before.own)) / (now.clock - before.clock)
    return max(1, min(most, math.floor(cores - max(0.0, others) + SLACK)))


@contextlib.contextmanager
def following_load(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields a function to call between two steps: twice a second it sets torch's number of threads.

    It does nothing on other devices and where OMP_NUM_THREADS says how many there shall be. At the end the
    number is as it was.
    """
    most = torch.get_num_threads()

    def look() -> None:
        global last_look
        now = usage()
        torch.set_num_threads(fitting_threads(most, psutil.cpu_count() or most, last_look, now))
        last_look = now

    def follow() -> None:
        if time.monotonic() - last_look.clock >= LOOK_EVERY:
            look()

    if device.type != "cpu" or most == 1 or "OMP_NUM_THREADS" in os.environ:
        yield lambda: None
        return
    try:
        # Before the first step, which may be long: it reads many prompts.
        time.sleep(max(0.0, last_look.clock + SHORTEST_LOOK - time.monotonic()))
        look()
        yield follow
    finally:
        torch.set_num_threads(most)
