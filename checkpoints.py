"""A training's checkpoints: which of them are whole, and which one a run goes on from.

A checkpoint is a folder `checkpoint-STEP`. Its manifest lists every file with size and SHA-256 and is
written last, so a checkpoint that was cut short has none. Nothing is loaded from a checkpoint that
does not agree with its manifest: a missing optimizer state would lead to other weights in silence.
"""

import json
import re
import shutil
from pathlib import Path

from common import UserError, hash_file, log, read_json, write_atomically

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # transformers' name for the trainer's own state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_at(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def drop_checkpoints(folder: Path, keep: tuple[int, ...] = ()) -> None:
    """Remove the checkpoints but those of the steps to keep."""
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) not in keep:
            shutil.rmtree(checkpoint)


def write_manifest(checkpoint: Path) -> None:
    """List what the checkpoint holds. It is whole from now on."""
    files = {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in checkpoint.iterdir()}
    write_atomically(checkpoint / MANIFEST, json.dumps(files, indent=2) + "\n")


def find_fault(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being loaded, or None where it agrees with its manifest."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was not written to its end"
    try:
        listed = read_json(checkpoint / MANIFEST)
        there = {path.name: path for path in checkpoint.iterdir() if path.name != MANIFEST}
        for name in sorted(listed.keys() | there.keys()):
            path, entry = there.get(name), listed.get(name)
            if path is None:
                return f"{name} is missing"
            if entry is None:
                return f"{name} is not in its {MANIFEST}"
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a plain file"
            if entry != {"size": path.stat().st_size, "sha256": hash_file(path)}:
                return f"{name} has changed since it was written"
    except (UserError, OSError) as error:
        return str(error)
    return None if STATE in listed else f"{STATE} is missing"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, as is the best one so far that it refers to; None where there is none.

    What is passed over is said, with the reason.
    """
    faults: dict[int, str | None] = {}

    def fault_at(step: int) -> str | None:
        if step not in faults:
            checkpoint = checkpoint_at(folder, step)
            faults[step] = find_fault(checkpoint) if checkpoint.is_dir() else "it is missing"
        return faults[step]

    for checkpoint in reversed(checkpoints(folder)):
        fault = fault_at(step_of(checkpoint))
        if not fault:
            best = read_json(checkpoint / STATE).get("best_global_step")
            if best is not None and fault_at(best):
                fault = f"the best one so far, checkpoint-{best}, cannot be used: {fault_at(best)}"
        if not fault:
            log(f"going on after step {step_of(checkpoint)}, from {checkpoint}")
            return checkpoint
        log(f"{checkpoint}: passed over: {fault}")
    log(f"{folder}: no checkpoint to go on from, beginning anew")
    return None
