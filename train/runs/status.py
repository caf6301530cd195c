"""Where a run stands, from its folder alone: it may be training in another process, finished, stopped or dead."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prep.console import duration_text
from prep.files import lock_is_held
from train.runs.run_dir import STATUS, last_of, newest_checkpoint, read_description, read_lines, seconds_left

_SAID = {
    "training": "training",
    "new": "not trained in this folder yet",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "dead": "dead: it ended without a word, as by kill -9, for want of memory, or with its machine",
}


def status_of(run_dir: Path) -> dict[str, Any]:
    """What `alextrain status --json` prints; only reads, and holds nothing up.

    run_dir, model, recipe
    state              training, finished, stopped, failed, dead: gone without a word, or new: with a checkpoint that
                       `alextrain import` made or a fork began with, and no training yet
    alive, finished    whether a process trains in the folder; whether there is nothing left to do
    said               how it stopped or why it failed, or ""
    process, host      that began last, None of a run that did not get so far
    step, steps        made, and to be made in all; a schedule that waits for plateaus may end before
    epoch, epochs      the same in passes over the data
    seconds_left       at the rate of the last intervals, validations not counted; None before the first
    train, val, best   the last lines of metrics.jsonl, and the validation with the least top-1 error; or None
    seconds_since      the last line was written, or None
    checkpoint         {"step", "seconds_since"} of the newest, or None

    Raises UserError for a folder that is no run.
    """
    about = read_description(run_dir)
    alive = lock_is_held(run_dir)
    try:
        ended = json.loads((run_dir / STATUS).read_bytes())
    except (OSError, ValueError):
        ended = {}
    state = ended.get("state", "training")
    lines, saved, now = read_lines(run_dir), newest_checkpoint(run_dir), time.time()
    gone = "new" if saved and not lines and not (run_dir / STATUS).exists() else "dead"
    state = "training" if alive else gone if state == "training" else state
    train, val = last_of(lines, "train"), last_of(lines, "val")
    step = max([line["step"] for line in lines[-1:]] + [saved[0] if saved else 0])
    steps, settings = about["length"]["steps"], about["settings"]
    finished = state == "finished"
    left = 0.0 if finished else seconds_left(lines, step, steps, settings["batch_size"])
    return {
        "run_dir": str(run_dir),
        "model": about["identity"]["model"],
        "recipe": about["identity"]["recipe"],
        "state": state,
        "alive": alive,
        "finished": finished,
        "said": "" if state in ("training", "new", "dead") else ended["said"],
        "process": ended.get("process"),
        "host": ended.get("host"),
        "step": step,
        "steps": steps,
        "epoch": step / max(about["length"]["steps_per_epoch"], 1),
        "epochs": settings["epochs"],
        "seconds_left": left,
        "train": train,
        "val": val,
        "best": min(
            (line for line in lines if line["kind"] == "val"), key=lambda line: line["top1_error"], default=None
        ),
        "seconds_since": max(0.0, now - lines[-1]["unix_time_s"]) if lines and "unix_time_s" in lines[-1] else None,
        "checkpoint": {"step": saved[0], "seconds_since": max(0.0, now - saved[1])} if saved else None,
    }


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """The same for a person."""
    where = f" (process {status['process']} on {status['host']})" if status["alive"] and status["process"] else ""
    said = f": {status['said']}" if status["state"] == "failed" else f" {status['said']}" if status["said"] else ""
    left = status["seconds_left"]
    to_go = f"; {duration_text(left)} left{'' if status['alive'] else ' to train'}" if left else ""
    lines = [
        f"{status['run_dir']}: {_SAID[status['state']]}{said}{where}",
        f"{status['model']}, recipe {status['recipe']}",
        f"step {status['step']:,} of {status['steps']:,}, epoch {status['epoch']:.2f} of {status['epochs']}{to_go}",
    ]
    train, val, best, saved = (status[name] for name in ("train", "val", "best", "checkpoint"))
    if train:
        since = "" if status["seconds_since"] is None else f", {duration_text(status['seconds_since'])} ago"
        lines.append(
            f"step {train['step']:,}{since}: loss {train['loss']:.3f}, top-1 {train['top1_error']:.1%}, top-5 "
            f"{train['top5_error']:.1%}, lr {train['lr']:g}, {train['images_per_s']:,.1f} images/s, waits for stream "
            f"{train['waiting_share']:.1%}"
        )
    if val and best:
        lines.append(
            f"validation at epoch {val['epoch']}: loss {val['loss']:.3f}, top-1 {val['top1_error']:.1%}, top-5 "
            f"{val['top5_error']:.1%}; best top-1 {best['top1_error']:.1%} at epoch {best['epoch']}"
        )
    if saved:
        lines.append(f"checkpoint of step {saved['step']:,}, {duration_text(saved['seconds_since'])} ago")
    else:
        lines.append("no checkpoint yet")
    if not status["alive"] and not status["finished"]:
        begins = f"goes on after step {saved['step']:,}" if saved else "begins it anew"
        lines.append(f"The same alextrain run {begins}.")
    return lines
