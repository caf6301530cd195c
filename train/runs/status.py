"""Status of a run, read from the run folder: training, finished, stopped, failed, crashed ("dead") or new.

Reading the status does not disturb a process that is training in the folder.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from prep.console import UserError, duration_text
from prep.files import lock_is_held
from prep.schema import decode, read_regular
from train.formats.small_files import MAX_BYTES, StatusFile
from train.runs.run_dir import (
    STATUS,
    errors_text,
    last_line,
    newest_checkpoint,
    read_description,
    read_metrics,
    seconds_left,
)

_STATE_TEXT = {
    "training": "training",
    "new": "not trained in this folder yet",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "dead": "crashed: the process ended without writing a status (kill -9, OOM killer, reboot)",
}


def status_of(run_dir: Path) -> dict[str, Any]:
    """Return the object that `alextrain status --json` prints.

    run_dir            path of the run folder, as given on the command line
    model, recipe      names of the architecture and the recipe
    classes            number of classes
    seed, stream_seed  seed of the run, and seed of its training stream
    service            the service that decodes the images, as given by --service, or None
    state              "training", "finished", "stopped", "failed", "dead" (the process ended without writing a status),
                       or "new" (`alextrain import` or --fork wrote a checkpoint, and no training has begun)
    alive, finished    alive: a process is training in the folder; finished: the run has finished
    said               reason why the run stopped or failed; "" if there is no reason
    process, host      id and host of the process that trained last; None if no status was written
    step, steps        steps completed, and steps in all; a plateau schedule can end the run earlier
    epoch, epochs      epochs completed (can be a fraction), and epochs in all
    seconds_left       predicted time until training ends, without validations; None if `train` is None
    train, val         the last training line and the last validation line of metrics.jsonl, or None
    best               the validation line with the lowest top-1 error, or None
    seconds_since      seconds since the last line of metrics.jsonl was written, or None
    checkpoint         {"step", "seconds_since"} of the newest checkpoint, or None

    Raises UserError for a folder that is not a run, and for a damaged run.json, status.json or metrics.jsonl.
    """
    description = read_description(run_dir)
    identity = description["identity"]
    written = _read_status(run_dir)
    lines, saved, now = read_metrics(run_dir), newest_checkpoint(run_dir), time.time()
    state = written.get("state", "training")
    held = lock_is_held(run_dir)
    alive = _seems_alive(written) if held is None else held
    if alive:
        state = "training"
    elif state == "training":
        state = "new" if saved and not lines and not (run_dir / STATUS).exists() else "dead"
    step = max([line["step"] for line in lines[-1:]] + [saved[0] if saved else 0])
    steps, settings = description["length"]["steps"], description["settings"]
    finished = state == "finished"
    validations = [line for line in lines if line["kind"] == "val"]
    return {
        "run_dir": str(run_dir),
        "model": identity["model"],
        "recipe": identity["recipe"],
        "classes": len(description["classes"]),
        "seed": identity.get("seed"),
        "stream_seed": identity.get("stream_seed", identity.get("seed")),
        "service": settings["service"],
        "state": state,
        "alive": alive,
        "finished": finished,
        "said": "" if state in ("training", "new", "dead") else written["said"],
        "process": written.get("process"),
        "host": written.get("host"),
        "step": step,
        "steps": steps,
        "epoch": step / max(description["length"]["steps_per_epoch"], 1),
        "epochs": settings["epochs"],
        "seconds_left": 0.0 if finished else seconds_left(lines, step, steps, settings["batch_size"]),
        "train": last_line(lines, "train"),
        "val": last_line(lines, "val"),
        "best": min(validations, key=lambda line: line["top1_error"], default=None),
        "seconds_since": max(0.0, now - lines[-1]["unix_time_s"]) if lines and "unix_time_s" in lines[-1] else None,
        "checkpoint": {"step": saved[0], "seconds_since": max(0.0, now - saved[1])} if saved else None,
    }


def _read_status(run_dir: Path) -> dict[str, Any]:
    """Return the content of status.json; {} if there is no such file.

    Raises UserError if the file is damaged or cannot be read.
    """
    path, advice = run_dir / STATUS, "Remove this file; the next training in the folder writes it again."
    try:
        content = read_regular(path, MAX_BYTES, advice)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    return msgspec.structs.asdict(decode(StatusFile, content, str(path), advice))


def _seems_alive(written: Mapping[str, Any]) -> bool:
    """Return whether the process that wrote a status is still training.

    This function is for a file system whose locks do not show whether a process is training. If the process is on
    another machine, it counts as alive until it writes that it has ended.
    """
    if written.get("state") != "training":
        return False
    if written.get("host") != platform.node():
        return True
    return Path(f"/proc/{written.get('process')}").exists()


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the result of `status_of` as lines of text."""
    process = f" (process {status['process']} on {status['host']})" if status["alive"] and status["process"] else ""
    reason = f": {status['said']}" if status["state"] == "failed" else f" {status['said']}" if status["said"] else ""
    seed, stream_seed, seconds = status["seed"], status["stream_seed"], status["seconds_left"]
    time_left = f"; {duration_text(seconds)} left{'' if status['alive'] else ' to train'}" if seconds else ""
    lines = [
        f"{status['run_dir']}: {_STATE_TEXT[status['state']]}{reason}{process}",
        f"{status['model']}, recipe {status['recipe']}"
        + ("" if stream_seed == seed else f", seed {seed}, stream seed {stream_seed}")
        + (f", service {status['service']}" if status["service"] else ""),
        f"step {status['step']:,} of {status['steps']:,}, epoch {status['epoch']:.2f} of {status['epochs']}{time_left}",
    ]
    classes = status["classes"]
    train, val, best, saved = (status[name] for name in ("train", "val", "best", "checkpoint"))
    if train:
        age = "" if status["seconds_since"] is None else f", {duration_text(status['seconds_since'])} ago"
        lines.append(
            f"step {train['step']:,}{age}: loss {train['loss']:.3f}, {errors_text(train, classes)}, "
            f"lr {train['lr']:g}, {train['images_per_s']:,.1f} images/s, waits for stream {train['waiting_share']:.1%}"
        )
    if val and best:
        lines.append(
            f"validation at epoch {val['epoch']}: loss {val['loss']:.3f}, {errors_text(val, classes)}; "
            f"best top-1 error {best['top1_error']:.1%} at epoch {best['epoch']}"
        )
    if saved:
        lines.append(f"checkpoint of step {saved['step']:,}, {duration_text(saved['seconds_since'])} ago")
    else:
        lines.append("no checkpoint yet")
    if not status["alive"] and not status["finished"]:
        effect = f"resumes after step {saved['step']:,}" if saved else "starts the run again from step 0"
        lines.append(f"The same alextrain run command {effect}.")
    return lines
