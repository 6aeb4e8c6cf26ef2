"""A program that is measured beside this project, in a process and an environment of its own."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

import psutil

from common import UserError


class Peer:
    """A process that answers one JSON object a line with one a line; it rests between two questions.

    started: its first line. idle: seconds of processor time that it used while it rested. rested: how long that was.
    """

    def __init__(self, process: subprocess.Popen, log: IO[str], flag: str):
        self.process, self.log, self.flag = process, log, flag
        self.idle = self.rested = 0.0
        self.started = self.read()
        self.since = time.perf_counter(), self.processor_seconds()

    def ask(self, question: dict) -> dict:
        """Raises UserError where the process ends, after its last lines on stderr."""
        clock, used = self.since
        self.rested += time.perf_counter() - clock
        self.idle += self.processor_seconds() - used
        with contextlib.suppress(BrokenPipeError):  # reading tells of it
            print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.read()
        self.since = time.perf_counter(), self.processor_seconds()
        return answer

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        print(*self.log.readlines()[-20:], sep="", end="", file=sys.stderr)
        raise UserError(f"{self.flag}: the process has ended; what it wrote last stands above")

    def processor_seconds(self) -> float:
        """What the process and those that it started have used so far, of all cores."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in processes)  # of the user and of the system


@contextlib.contextmanager
def peer(command: Sequence[str], log: IO[str], flag: str, environment: dict) -> Iterator[Peer]:
    """Start a peer, which ends with the block. flag: begins the errors. log: gets what it writes to stderr."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
    try:
        process = subprocess.Popen(command, env=environment, **pipes)
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}") from error
    try:
        yield Peer(process, log, flag)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(30)  # so that it ends its own processes
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
