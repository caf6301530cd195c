"""Formats the state of a service as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prep.console import bytes_text, count_noun, duration_text, print_line


def print_state(state: dict[str, Any]) -> None:
    """Print the state of a service, which Coordinator.status returns, to standard output."""
    for line in state_lines(state):
        print_line(line)


def state_lines(state: dict[str, Any]) -> list[str]:
    """Return the lines of `alexstream status`."""
    workers, consumers = state["workers"], state["consumers"]
    limits = f"{state['min_workers']} to {state['max_workers']}"
    lines = [
        f"{state['name']}: {state['store']}, up {duration_text(state['up_s'])}",
        f"  workers    {len(workers)} ready, {state['starting']} starting ({limits}, each "
        f"{count_noun(state['threads'], 'thread')})",
    ]
    for host, count in sorted(Counter(worker["host"] for worker in workers).items()):
        lines.append(f"             {host}: {count_noun(count, 'worker')}")
    lines += [f"  not used   {bad['host']}: {bad['why']}" for bad in state["unused_nodes"]]
    if state["last_fault"]:
        lines.append(f"  fault      {state['last_fault']}")
    lines.append(f"  consumers  {len(consumers)}")
    for consumer in consumers:
        seed = "" if consumer["seed"] is None else f" with seed {consumer['seed']}"
        alone = "" if consumer["shares"] else ", reads alone"
        lines.append(
            f"             {consumer['name']}: {consumer['split']}{seed}, batch {consumer['position']:,}{alone}"
        )
    kept = bytes_text(state["kept_bytes"])
    lines.append(
        f"  batches    {count_noun(state['queue'], 'batch', 'batches')} in the queue, {kept} kept for consumers; "
        f"{count_noun(state['images_made'], 'image')} made, {count_noun(state['retries'], 'retry', 'retries')}"
    )
    return lines


def ready_line(state: dict[str, Any], advice: str) -> str:
    """Return a line that says whether the service is ready, followed by `advice`."""
    missing = state["min_workers"] - len(state["workers"])
    if missing <= 0:
        return f"Service {state['name']} is ready. {advice}"
    cores = count_noun(state["threads"], "free core")
    return (
        f"Service {state['name']} waits for {count_noun(missing, 'worker')}: each needs a node with {cores} and the "
        f"store. See: alexstream status. {advice}"
    )


def progress_line(state: dict[str, Any], images_per_s: float) -> str:
    """Return a line of progress of a running service."""
    workers = count_noun(len(state["workers"]), "worker")
    consumers = count_noun(len(state["consumers"]), "consumer")
    return (
        f"{images_per_s:,.0f} images/s, {workers}, {consumers}, queue {state['queue']}, "
        f"{bytes_text(state['kept_bytes'])} kept, {count_noun(state['images_made'], 'image')} made"
    )
