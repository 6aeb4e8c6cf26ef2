"""A run's files and record: locking, resuming, and what --overwrite and --resume mean."""

import contextlib
import datetime
import fcntl
import glob
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

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


class RunOutput:
    """A run's files: NAME.jsonl when it is finished, NAME.jsonl.part until then, NAME.run.json.

    Every answer is appended to the part file the moment it is there. A second start reads which
    answers exist, drops a torn last line and asks for the rest; `finish` sorts all by (id, sample)
    and puts NAME.jsonl in place in one step. The part file is locked while its process lives.

    Of several processes each has a part file of its own (NAME.jsonl.part-1 is that of the second); the main
    process waits for the others' locks at the end and takes in what they wrote, as it does at a start with
    what any number of killed processes left.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.main_part = Path(f"{path}.part")
        self.part_path = self.main_part if is_main() else Path(f"{path}.part-{rank()}")
        self.record_path = self.path.with_suffix(".run.json")
        self.places = {}  # (id, sample) -> (file, offset) of its line
        self.totals = dict.fromkeys(("answers", "prompt_tokens", "output_tokens", "hit_limit"), 0)

    @contextlib.contextmanager
    def opened(self, record, overwrite=None):
        """Lock, compare with the run record on disk, find what is done; release at the end.

        overwrite: "always" drops what is there, "changed" what a run that decides differently made.
        Raises UserError where another process writes, where without `overwrite` the record on disk
        was made by a run that decides differently, or where a file cannot be written.
        """
        with self.named_errors():
            if self.path.is_dir():
                raise UserError(f"--output {self.path}: is a folder; pass a file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part = open(self.part_path, "a+b", buffering=0)  # noqa: SIM115 - closed below
        try:
            self.lock(self.part)
            if is_main():
                segments = self.prepare(record, overwrite)
            wait_for_all()
            self.index(self.path)
            self.index(self.main_part)
            if is_main():
                self.record = record | {"segments": self.complete(segments) + record["segments"]}
            try:
                yield self
            except BaseException as error:
                if self.places or not isinstance(error, UserError):
                    log(
                        f"{self.path}: stopped, {len(self.places)} answers are on disk; the same command goes on from there"
                    )
                raise
        finally:
            if self.part_path.exists() and not self.part_size():
                self.part_path.unlink()
            self.part.close()

    def prepare(self, record, overwrite):
        """Leave nothing of killed processes but whole answers in the one part file; returns the earlier segments."""
        peers = {f"{self.main_part.name}-{other}" for other in range(1, processes())}
        self.last_answer = max(path.stat().st_mtime for path in (self.part_path, *self.other_parts()))
        for name in (self.path.name, self.record_path.name):  # of a process killed while it wrote one
            for stray in self.path.parent.glob(f".{glob.escape(name)}.*.tmp"):
                stray.unlink()
        segments = self.earlier_segments(record, overwrite)
        self.repair_part()
        for path in self.other_parts():
            with open(path, "r+b") as other:
                if path.name not in peers:  # else it is open, and waits for us
                    self.lock(other)
                self.take_in(other)
            if path.name not in peers:
                path.unlink()
        return segments

    def other_parts(self):
        return sorted(self.path.parent.glob(f"{glob.escape(self.main_part.name)}-*"))

    def take_in(self, other):
        """Move the whole lines of another process's part file to our own."""
        for line in other:
            if line.endswith(b"\n"):
                self.write(line)
        other.truncate(0)

    def gather(self):
        """In the main process: wait until the others have ended, and take in what they wrote."""
        for number in range(1, processes()):
            path = Path(f"{self.main_part}-{number}")
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as other:  # none where it had nothing to do
                fcntl.flock(other, fcntl.LOCK_EX)
                self.take_in(other)
                path.unlink(missing_ok=True)
        self.index(self.part_path)

    def part_size(self):
        """Bytes of answers that no finished file holds yet."""
        return os.fstat(self.part.fileno()).st_size

    @contextlib.contextmanager
    def named_errors(self):
        try:
            yield
        except OSError as error:
            way_out = "make room there, then start the same command again" if self.places else "pass another --output"
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; {way_out}") from error

    def lock(self, part):
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{self.path}: another process is writing it; wait for it or pass another --output"
            ) from error

    def earlier_segments(self, new, overwrite):
        """The segments of the run record on disk, which must decide as the new one does."""
        try:
            if overwrite == "always":
                self.drop()
            elif self.record_path.exists():
                old = read_json(self.record_path)
                compare_records(self.record_path, old, new)
                note_changes(old["segments"][-1], new["segments"][-1])
                return old["segments"]
            elif self.path.exists() or self.part_size() or any(path.stat().st_size for path in self.other_parts()):
                raise UserError(
                    f"{self.path}: exists without its run record {self.record_path.name}; "
                    "pass --overwrite or another --output"
                )
        except UserError as error:
            if overwrite != "changed":
                raise
            log(f"made again: {str(error).partition(';')[0]}")
            self.drop()
        return []

    def drop(self):
        for path in (self.part_path, *self.other_parts()):
            os.truncate(path, 0)
        self.path.unlink(missing_ok=True)
        self.record_path.unlink(missing_ok=True)

    def complete(self, segments):
        """Give a killed segment what it could not write: its answers, and the time of the last one."""
        for segment in segments:
            if segment.get("seconds") is None:
                started = datetime.datetime.fromisoformat(segment["started"]).timestamp()
                segment["seconds"] = round(max(0.0, self.last_answer - started), 3)
                segment.update(self.totals_beyond([other for other in segments if other is not segment]))
        return segments

    def totals_beyond(self, segments):
        """What is on disk less what these segments made."""
        return {name: total - sum(s.get(name, 0) for s in segments) for name, total in self.totals.items()}

    def repair_part(self):
        """Cut off a last line that was torn when its process died."""
        size = self.part_size()
        with open(self.part_path, "rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        if whole < size:
            log(f"{self.part_path}: dropped a torn last line of {size - whole} bytes")
            self.part.truncate(whole)

    def index(self, path):
        if path.exists():
            offset = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):  # the main process is writing it
                        break
                    row = parse_json_line(
                        path, number, line, ("id", "sample", "finish_reason", "prompt_tokens", "output_tokens")
                    )
                    self.count(row, path, offset)
                    offset += len(line)

    def count(self, row, path, offset):
        if (row["id"], row["sample"]) not in self.places:
            self.totals["answers"] += 1
            self.totals["hit_limit"] += row["finish_reason"] == "length"
            for name in ("prompt_tokens", "output_tokens"):
                self.totals[name] += row[name]
        self.places[row["id"], row["sample"]] = path, offset

    def write_record(self, seconds=None):
        """Write the run record; `seconds` is how long the present segment has taken."""
        if not is_main():
            return
        *earlier, segment = self.record["segments"]
        segment.update(self.totals_beyond(earlier), seconds=seconds)
        with self.named_errors():
            write_atomically(self.record_path, json.dumps(self.record, indent=2) + "\n")

    def append(self, row):
        """Put one answer on disk. It is there when this returns, whatever happens to the process."""
        if not os.fstat(self.part.fileno()).st_nlink:
            self.put_back()
        offset = self.part.seek(0, os.SEEK_END)
        self.write(json.dumps(row).encode() + b"\n")
        self.count(row, self.part_path, offset)

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
            f"{self.path.parent}: was removed while the run wrote to it; {len(self.places)} answers are "
            f"back in {self.part_path}: the same command goes on from there"
        )

    def finish(self):
        """Sort all answers into NAME.jsonl and drop the part file; the main process does."""
        with self.named_errors(), contextlib.ExitStack() as stack:
            sources = {p: stack.enter_context(open(p, "rb")) for p in {place[0] for place in self.places.values()}}
            with replacing(self.path) as file:
                for _, (source, offset) in sorted(self.places.items()):
                    sources[source].seek(offset)
                    file.write(sources[source].readline())
            self.part.truncate(0)


def compare_records(path, old, new, way_out="pass --overwrite to drop it, or another --output"):
    """UserError where two runs of one output would mix: it names the field, both values and the way out."""
    if not is_run_record(old):
        raise UserError(f"{path}: is no run record; {way_out}")
    before, now = old["decides"], new["decides"]
    for key in [*now, *(before.keys() - now.keys())]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"{path}: was made with {key} = {shorten(before.get(key))}, this run has "
                f"{shorten(now.get(key))}; {way_out}"
            )


def note_changes(old, new):
    """Note what describes the run and is no longer so: it decides nothing, up to rounding."""
    changed = [key for key in new if key not in ("started", "command") and new[key] != old.get(key)]
    if changed:
        values = (f"{key} {shorten(new[key])}, was {shorten(old.get(key))}" for key in changed)
        log("note: other than before: " + "; ".join(values))


def shorten(value, most=80):
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


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


def project_commit():
    """This project's git commit, `-dirty` where files differ from it, None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


RECORD = "train.run.json"


@contextlib.contextmanager
def locked(folder):
    """The folder, made where there is none, held against a second run of it; the main process holds it for all."""
    if not is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = "another process trains in it; wait for it or pass another folder"
            raise UserError(f"--output-dir {folder}: {told}") from error
        yield
    finally:
        os.close(handle)


def claim_folder(args, record):
    """Make the folder this run's own: (whether it is finished, the checkpoint to go on from). UserError where it holds another."""
    folder, path = args.output_dir, args.output_dir / RECORD
    try:
        if path.exists():
            drop_or_go_on(args, path, record)
        held = sorted(entry.name for entry in folder.iterdir())
        if held and not path.exists():
            raise UserError(f"--output-dir {folder}: holds {held[0]!r} and no {RECORD}; pass an empty folder")
        if path.exists() and read_json(path)["result"]:
            log(f"{folder}: finished already")
            drop_checkpoints(folder)  # which a kill may have left
            return True, None
        write_record(args, record)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error
    return False, last_checkpoint(folder) if args.resume else None


def drop_or_go_on(args, path, record):
    """Take over the segments of the run in the folder, or empty it, as --resume and --overwrite say."""
    try:
        if args.overwrite != "always":
            if not args.resume:
                raise UserError(
                    f"--output-dir {args.output_dir}: holds another run; pass --resume, --overwrite or another folder"
                )
            old = read_json(path)
            compare_records(path, old, record, "pass the same flags, --overwrite, or another --output-dir")
            record["segments"] = old["segments"] + record["segments"]
            return
    except UserError as error:
        if args.overwrite != "changed":
            raise
        log(f"made again: {str(error).partition(';')[0]}")
    for entry in args.output_dir.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_record(args, record):
    write_atomically(args.output_dir / RECORD, json.dumps(record, indent=2) + "\n")


def checkpoints(folder):
    """The checkpoint folders, the newest last."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def drop_checkpoints(folder):
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


def last_checkpoint(folder):
    """The newest whole checkpoint, or None. The trainer's state is written last: without it, a kill cut it short."""
    for checkpoint in reversed(checkpoints(folder)):
        with contextlib.suppress(UserError):
            step = read_json(checkpoint / "trainer_state.json")["global_step"]
            log(f"going on after step {step}, from {checkpoint}")
            return checkpoint
    log(f"{folder}: no checkpoint yet, beginning anew")
    return None
