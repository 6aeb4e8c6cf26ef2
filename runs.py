"""A run's files and record: locking, resuming, and what --overwrite and --resume mean.

Inference writes one file of answers (`RunOutput`), training writes a folder (`claim_folder`). Both lock their
output while they run (`locked`), and both ask `earlier_segments` whether a run may go on with what is there.
"""

import contextlib
import datetime
import errno
import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints import drop_checkpoints, last_checkpoint
from common import (
    UserError,
    is_main,
    is_run_record,
    log,
    parse_json_line,
    processes,
    rank,
    read_json,
    replacing,
    wait_for_all,
    write_atomically,
)


class Conflict(UserError):
    """The output holds something that this run must not go on with: what it is, and the way out."""

    def __init__(self, found: str, way_out: str):
        super().__init__(f"{found}; {way_out}")
        self.found = found


# ---- What --overwrite and --resume mean, for inference and training alike


def earlier_segments(path: Path, record: dict, drop, overwrite: str | None, way_out: str, resume=True, stray=None):
    """The segments of the run that `record` goes on with; [] where the run begins anew.

    path: the run record on disk. drop: removes what that run wrote. overwrite: "always" drops it, "changed" drops
    it where it was made with other flags, None never does. resume: whether a run may go on at all. stray: an
    output file that is there although the run record is not, or None.
    Raises Conflict where the run may neither go on nor be dropped.
    """
    if overwrite == "always":
        drop()
        return []
    try:
        if path.exists():
            if not resume:
                raise Conflict(f"{path}: holds a run already", f"pass --resume to go on with it, {way_out}")
            return comparable_segments(path, record, way_out)
        if stray:
            raise Conflict(f"{stray}: exists without its run record {path.name}", f"pass {way_out}")
    except Conflict as conflict:
        if overwrite != "changed":
            raise
        log(f"made again: {conflict.found}")
        drop()
    return []


def comparable_segments(path: Path, record: dict, way_out: str):
    """The segments of the run record on disk; Conflict where it is damaged, or was made with other flags."""
    try:
        old = read_json(path)
    except UserError as error:
        raise Conflict(str(error), f"pass {way_out}") from error
    trouble = "is not a run record" if not is_run_record(old) else find_damage(old) or find_difference(old, record)
    if trouble:
        raise Conflict(f"{path}: {trouble}", f"pass the same flags, or {way_out}")
    note_changes(old["segments"][-1], record["segments"][-1])
    return old["segments"]


def read_first_start(records: Sequence[Path], overwrite: str | None) -> datetime.datetime:
    """When the run of the first of these run records that can be read was started first, else now.

    A chat template that prints the date prints that of the first start, so that a run can go on after midnight.
    """
    for path in records if overwrite != "always" else ():
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # no record, or none of this shape
            record = read_json(path)
            first = record["segments"][0] if is_run_record(record) else {}
            if "template_time" in first:
                return datetime.datetime.fromisoformat(first["template_time"])
            return datetime.datetime.fromisoformat(first["started"]).astimezone().replace(tzinfo=None)
    return datetime.datetime.now().replace(microsecond=0)


TOTALS = ("answers", "prompt_tokens", "output_tokens", "hit_limit")


def find_damage(record):
    """What keeps a run record from being gone on with, or None."""
    for number, segment in enumerate(record["segments"]):
        try:
            datetime.datetime.fromisoformat(segment.get("started"))
        except (TypeError, ValueError):
            return f"segment {number} has no time in 'started'"
        if not isinstance(segment.get("seconds"), int | float | None):
            return f"segment {number} has no number in 'seconds'"
        for name in TOTALS:
            if not isinstance(segment.get(name, 0), int):
                return f"segment {number} has no whole number in {name!r}"
    return None


def find_difference(old, new):
    """The first field in which two runs decide differently, with both values; or None."""
    before, now = old["decides"], new["decides"]
    for key in [*now, *(before.keys() - now.keys())]:
        if before.get(key) != now.get(key):
            return "was made with {} = {}, this run has {}".format(key, *shorten(before.get(key), now.get(key)))
    return None


def note_changes(old, new):
    """Note what describes the run and has changed. It decides nothing, up to rounding."""
    changed = [key for key in new if key not in ("started", "command", "seconds") and new[key] != old.get(key)]
    if changed:
        values = ("{} is {}, was {}".format(key, *shorten(new[key], old.get(key))) for key in changed)
        log("note: " + "; ".join(values))


def shorten(*values, most=80):
    """Values as JSON of at most about `most` characters, cut around the place where they begin to differ."""
    texts = [json.dumps(value) for value in values]
    begin = max(0, len(os.path.commonprefix(texts)) - most // 4) if len(texts) > 1 else 0
    if all(len(text) <= most for text in texts):
        return texts
    return [
        ("..." if begin else "") + text[begin : begin + most] + ("..." if begin + most < len(text) else "")
        for text in texts
    ]


# ---- Locks

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: Path, refusal: UserError, wait=False):
    """Hold the lock file `path`, which is removed at the end; raise `refusal` where another process holds it.

    wait: wait for the other process instead. Yields whether the file system has locks: some network file
    systems have none, and there the run goes on without.
    """
    from filelock import FileLock, Timeout

    lock, has_locks = FileLock(path, fallback_to_soft=False), True
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise refusal from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
        log(f"note: {path.parent} is on a file system without locks: do not start the same command twice at a time")
    try:
        yield has_locks
    finally:
        with contextlib.suppress(OSError):  # Windows removes it when it is released
            path.unlink(missing_ok=True)
        if has_locks:
            lock.release()


# ---- The answers of a run


class AnswerIndex:
    """Where each answer stands on disk, and the totals over all of them."""

    def __init__(self):
        self.places = {}  # (question id, sample) -> (file, offset of its line)
        self.totals = dict.fromkeys(TOTALS, 0)

    def read(self, path: Path):
        """Take in the whole lines of a file, if it is there."""
        if not path.exists():
            return
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # the main process is writing it
                    break
                self.add(read_answer(path, number, line), path, offset)
                offset += len(line)

    def add(self, answer: dict, path: Path, offset: int):
        key = answer["id"], answer["sample"]
        if key not in self.places:
            self.totals["answers"] += 1
            self.totals["hit_limit"] += answer["finish_reason"] == "length"
            for name in ("prompt_tokens", "output_tokens"):
                self.totals[name] += answer[name]
        self.places[key] = path, offset

    def totals_beyond(self, segments):
        """The totals on disk less those of these segments."""
        return {name: total - sum(s.get(name, 0) for s in segments) for name, total in self.totals.items()}

    def complete(self, segments, last_answer: float):
        """Give a segment whose process was killed its totals, and the time until its last answer; True if one was."""
        killed = [segment for segment in segments if segment.get("seconds") is None]
        for segment in killed:
            started = datetime.datetime.fromisoformat(segment["started"]).timestamp()
            segment["seconds"] = round(max(0.0, last_answer - started), 3)
            segment.update(self.totals_beyond([other for other in segments if other is not segment]))
        return bool(killed)


WHOLE_NUMBERS = ("id", "sample", "prompt_tokens", "output_tokens")


def read_answer(path, number, line):
    """The answer on one line of a run's file; UserError where it is not of the shape that a run writes."""
    answer = parse_json_line(path, number, line, (*WHOLE_NUMBERS, "finish_reason"))
    for key in WHOLE_NUMBERS:
        if type(answer[key]) is not int or answer[key] < 0:
            raise UserError(
                f"{path}:{number}: {key!r} must be a whole number, this is {shorten(answer[key])[0]}; "
                "pass --overwrite to drop the file, or another --output"
            )
    return answer


class RunOutput:
    """A run's files: NAME.jsonl when it is finished, NAME.jsonl.part until then, NAME.run.json.

    Every answer is appended to the part file the moment it is finished. A second start reads which
    answers exist, drops a torn last line and asks for the rest. `finish` sorts all by (id, sample)
    and puts NAME.jsonl in place in one step.

    Of several processes each has a part file of its own (NAME.jsonl.part-1 is that of the second), and holds a
    lock beside it. At the end the main process waits for the others' locks and takes in what they wrote. At
    a start it takes in what killed processes left, however many they were.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.main_part = Path(f"{path}.part")
        self.part_path = self.main_part if is_main() else Path(f"{path}.part-{rank()}")
        self.record_path = self.path.with_suffix(".run.json")
        self.answers = AnswerIndex()
        self.gathered = False  # whether the others are known to have ended

    @contextlib.contextmanager
    def opened(self, record, overwrite=None, before_drop: Callable[[], object] = lambda: None):
        """Lock, compare with the run record on disk, find what is done; release at the end.

        overwrite: see `earlier_segments`. before_drop: called before earlier answers are dropped; where it raises,
        they stay.
        Raises UserError where another process writes, where without `overwrite` the record on disk
        was made by a run that decides differently, or where a file cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with self.named_errors():
                if self.path.is_dir():
                    raise UserError(f"--output {self.path}: is a folder; pass a file")
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.has_locks = stack.enter_context(self.locked(self.part_path))
                stack.callback(self.drop_empty_part)
                self.part = stack.enter_context(open(self.part_path, "a+b", buffering=0))
            if is_main():
                segments, last_answer = self.prepare(record, overwrite, before_drop)
            wait_for_all()
            self.answers.read(self.path)
            self.answers.read(self.main_part)
            if is_main():
                if self.answers.complete(segments, last_answer):
                    self.store_record(record | {"segments": segments})
                self.record = record | {"segments": segments + record["segments"]}
            try:
                yield self
            except BaseException as error:
                done = len(self.answers.places)
                if done or not isinstance(error, UserError):
                    log(f"{self.path}: stopped, {done} answers are on disk; the same command goes on from there")
                raise
            if not self.has_locks and not self.gathered:
                wait_for_all()  # as the main process does in `gather`

    def locked(self, part, wait=False):
        told = f"{self.path}: another process is writing it; wait for it or pass another --output"
        return locked(Path(f"{part}.lock"), UserError(told), wait)

    def prepare(self, record, overwrite, before_drop):
        """Leave only whole answers, all in the one part file; returns the earlier segments and the last answer's time."""
        peers = {f"{self.main_part.name}-{other}" for other in range(1, processes())}
        for name in (self.path.name, self.record_path.name):  # of a process killed while it wrote one
            for stray in self.path.parent.glob(f".{glob.escape(name)}.*.tmp"):
                stray.unlink()
        written = [path for path in self.part_paths() if path.stat().st_size]
        written = written or [path for path in [self.path] if path.exists()]
        last_answer = max((path.stat().st_mtime for path in written), default=0.0)
        way_out = "--overwrite to drop it, or another --output"
        stray = self.path if written else None

        def drop():
            if stray or self.record_path.exists():
                before_drop()
            self.drop()

        segments = earlier_segments(self.record_path, record, drop, overwrite, way_out, stray=stray)
        self.repair_part()
        for path in self.part_paths()[1:]:
            with open(path, "r+b") as other:
                if path.name in peers:  # it is open, and waits for us
                    self.take_in(other)
                else:
                    with self.locked(path):
                        self.take_in(other)
            if path.name not in peers:
                path.unlink()
        return segments, last_answer

    def part_paths(self):
        """The part files: our own, then those of other processes."""
        name = re.compile(re.escape(self.main_part.name) + r"-\d+")
        return [self.part_path, *sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))]

    def take_in(self, other):
        """Move the whole lines of another process's part file to our own."""
        for line in other:
            if line.endswith(b"\n"):
                self.write(line)
        other.truncate(0)

    def gather(self):
        """In the main process: wait until the others have ended, and take in what they wrote."""
        if not self.has_locks:
            wait_for_all()
        self.gathered = True
        for number in range(1, processes()):
            path = Path(f"{self.main_part}-{number}")
            with self.locked(path, wait=True), contextlib.suppress(FileNotFoundError):  # it had nothing to do
                with open(path, "r+b") as other:
                    self.take_in(other)
                path.unlink(missing_ok=True)
        self.answers.read(self.part_path)

    def part_size(self):
        """Bytes of answers that no finished file holds yet."""
        return os.fstat(self.part.fileno()).st_size

    def drop_empty_part(self):
        with contextlib.suppress(FileNotFoundError):  # the main process may have taken it
            if not self.part_path.stat().st_size:
                self.part_path.unlink()

    @contextlib.contextmanager
    def named_errors(self):
        try:
            yield
        except OSError as error:
            goes_on = "make room there, then start the same command again"
            way_out = goes_on if self.answers.places else "pass another --output"
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; {way_out}") from error

    def drop(self):
        """Remove what the earlier run wrote. The record goes last: a kill leaves nothing without one."""
        for path in self.part_paths():
            os.truncate(path, 0)
        self.path.unlink(missing_ok=True)
        self.record_path.unlink(missing_ok=True)

    def repair_part(self):
        """Cut off a last line that was torn when its process died."""
        size = self.part_size()
        with open(self.part_path, "rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        if whole < size:
            log(f"{self.part_path}: dropped a torn last line of {size - whole} bytes")
            self.part.truncate(whole)

    def write_record(self, seconds=None):
        """Write the run record; `seconds` is how long the present segment has taken."""
        if is_main():
            *earlier, segment = self.record["segments"]
            segment.update(self.answers.totals_beyond(earlier), seconds=seconds, peak_memory=peak_memory())
            self.store_record(self.record)

    def store_record(self, record):
        with self.named_errors():
            write_atomically(self.record_path, json.dumps(record, indent=2) + "\n")

    def append(self, answer):
        """Put one answer on disk. It is there when this returns, whatever happens to the process."""
        if not os.fstat(self.part.fileno()).st_nlink:
            self.put_back()
        offset = self.part.seek(0, os.SEEK_END)
        self.write(json.dumps(answer).encode() + b"\n")
        self.answers.add(answer, self.part_path, offset)

    def write(self, line):
        line = memoryview(line)
        with self.named_errors():
            while line:
                line = line[self.part.write(line) :]

    def put_back(self):
        """The output folder was removed: the open file still holds the answers, write them again."""
        with self.named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part.seek(0)
            self.part_path.write_bytes(self.part.read())
        self.write_record()
        raise UserError(
            f"{self.path.parent}: was removed while the run wrote to it; {len(self.answers.places)} answers are "
            f"back in {self.part_path}: the same command goes on from there"
        )

    def finish(self):
        """Sort all answers into NAME.jsonl and drop the part file; the main process does."""
        places = self.answers.places
        with self.named_errors():
            with replacing(self.path) as file, contextlib.ExitStack() as stack:
                sources = {
                    path: stack.enter_context(open(path, "rb")) for path in {place[0] for place in places.values()}
                }
                for _, (path, offset) in sorted(places.items()):
                    sources[path].seek(offset)
                    file.write(sources[path].readline())
            self.part.truncate(0)


def describe_run(device=None):
    """What describes a run without deciding its output: versions, commit, start, and the device where there is one."""
    import platform
    from importlib.metadata import version

    described = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "commit": project_commit(),
    }
    if device is not None:
        import torch

        from model import device_name

        described |= {"device": f"{device.type}: {device_name(device)}", "threads": torch.get_num_threads()}
    return described


def peak_memory():
    """The most bytes that this process has held so far, `cpu` and on a GPU `cuda`; a system that does not tell is left out."""
    held = {}
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held["cpu"] = most if sys.platform == "darwin" else most * 1024
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        held["cuda"] = torch.cuda.max_memory_allocated()
    return held


def project_commit():
    """This project's git commit, `-dirty` where files differ from it, None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- The folder of a training

RECORD = "train.run.json"


def training_of(model_id: str) -> dict | None:
    """How a fine-tuned model in a local folder was trained, as its record says: what decided it, and its base."""
    with contextlib.suppress(UserError):
        record = read_json(Path(model_id) / RECORD)
        if is_run_record(record):
            return {"decides": record["decides"], "segments": [{"model": record["segments"][-1].get("model")}]}
    return None


# What a training writes beside its checkpoints. --overwrite removes these and nothing else.
TRAINING_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "trainer_state.json", "README.md", "training.png",
    "runs/*/events.out.tfevents.*", ".train.run.json.*.tmp", ".README.md.*.tmp",
)  # fmt: skip


@contextlib.contextmanager
def locked_folder(folder: Path):
    """The folder, made where there is none, locked against a second training; the main process locks it for all."""
    if not is_main():
        yield
        return
    refusal = UserError(f"--output-dir {folder}: another process trains in it; wait for it or pass another folder")
    with contextlib.ExitStack() as stack:
        with named_folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, refusal))
        yield


LOCK = "train.lock"


@contextlib.contextmanager
def named_folder_errors(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error


def claim_folder(folder: Path, record: dict, overwrite: str | None, resume: bool):
    """Make the folder this run's own; returns (whether it is finished, the checkpoint to go on from).

    UserError where it holds another run, or files and no run.
    """
    path = folder / RECORD
    with named_folder_errors(folder):
        held = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
        if held and not path.exists():
            raise UserError(f"--output-dir {folder}: holds {held[0]!r} and no {RECORD}; pass an empty folder")
        way_out = "--overwrite to drop it, or another --output-dir"
        earlier = earlier_segments(path, record, lambda: drop_training(folder), overwrite, way_out, resume)
        record["segments"] = earlier + record["segments"]
        if earlier and read_json(path).get("result"):
            log(f"{folder}: finished already")
            drop_checkpoints(folder)  # which a kill may have left
            return True, None
        write_record(folder, record)
    return False, last_checkpoint(folder) if resume else None


def drop_training(folder: Path):
    """Remove what a training wrote, by name, and name what is left.

    The record stays, without a result, until the new one takes its place: a kill leaves a run that can go on.
    """
    with contextlib.suppress(UserError):
        write_record(folder, read_json(folder / RECORD) | {"result": None})
    drop_checkpoints(folder)
    for path in [path for pattern in TRAINING_FILES for path in folder.glob(pattern)]:
        path.unlink()
    for logs in [*folder.glob("runs/*"), folder / "runs"]:
        with contextlib.suppress(OSError):  # not a folder, or not empty
            logs.rmdir()
    left = sorted(entry.name for entry in folder.iterdir() if entry.name not in (RECORD, LOCK))
    if left:
        log(f"{folder}: --overwrite leaves what is not a run's: {', '.join(left)}")


def write_record(folder: Path, record: dict):
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
