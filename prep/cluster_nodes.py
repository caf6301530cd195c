"""Checks that all nodes of a Ray cluster see the same files and have the same software versions."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from prep.console import UserError
from prep.files import unique_suffix

_POLL_S = 0.2
_CHECK_S = 60.0  # a node that does not answer within this time is reported as an error


def check_nodes(ray: ModuleType, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
    """Implement Runner.check_machines (prep/workers.py) for the nodes of a cluster.

    To check `folder`, this function writes a temporary file with random content into this folder. Every node must read
    the same content. Raises UserError for the first node that differs from this machine, with the name of the node and
    both values. A node that dies during the check is ignored, because Ray gives it no tasks. If this machine is the
    only node with CPU cores, nothing is compared.
    """
    if {node["NodeID"] for node in worker_nodes(ray)} == {ray.get_runtime_context().get_node_id()}:
        return
    content = secrets.token_hex(16)
    probe = folder / f".probe.{unique_suffix()}" if folder is not None else None
    expected = content if probe else "", versions(), _describe(source)
    try:
        if probe is not None:
            probe.write_text(content)
        check = ray.remote(_check_node)
        nodes = {}
        for node in worker_nodes(ray):
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": pinned(ray, node["NodeID"])}
            nodes[check.options(**options).remote(probe, source, versions)] = node
        waiting, deadline = list(nodes), time.monotonic() + _CHECK_S
        while waiting and time.monotonic() < deadline:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
            for ref in ready:
                name = _name(nodes[ref])
                try:
                    answer = ray.get(ref)
                except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                    continue
                except ray.exceptions.RayError as error:
                    raise UserError(f"{name} cannot run tasks: {cause_text(error)}.") from None
                _compare(name, answer, expected, folder, source)
        if waiting:
            name = _name(nodes[waiting[0]])
            raise UserError(f"{name} did not answer within {_CHECK_S:.0f} s. Check the node with: ray status")
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def worker_nodes(ray: ModuleType) -> list[dict[str, Any]]:
    """Return Ray's descriptions of those living nodes that have CPU cores."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def pinned(ray: ModuleType, node_id: str, soft: bool = False) -> Any:
    """Return the scheduling strategy that makes a task or actor run on the node `node_id`.

    With `soft`, Ray may choose another node if `node_id` is not available.
    """
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=soft)


def cause_text(error: Exception) -> str:
    """Return the cause of one of Ray's errors as one sentence, without a full stop."""
    cause = getattr(error, "cause", None)
    if cause is not None and not isinstance(cause, str):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}".rstrip(".")
    return " ".join(str(error).split()).partition(". ")[0][:300].rstrip(".") or type(error).__name__


def _name(node: dict[str, Any]) -> str:
    names = dict.fromkeys((node["NodeManagerHostname"], node["NodeName"]))
    return f"node {' '.join(names)} (Ray's ID {node['NodeID'][:12]})"


def _describe(path: Path) -> str:
    """Return a text with the kind of a path (folder, file or missing) and, for a file, its size.

    All nodes must return the same text.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return "a folder" if path.is_dir() else f"a file of {status.st_size:,} bytes"


def _check_node(
    probe: Path | None, source: Path, versions: Callable[[], dict[str, str]]
) -> tuple[str, dict[str, str], str]:
    """Return, for this node, the content of the file `probe`, the software versions and a description of `source`."""
    content = ""
    if probe is not None:
        with suppress(OSError):
            content = probe.read_text()
    return content, versions(), _describe(source)


def _compare(name: str, answer: Any, expected: Any, folder: Path | None, source: Path) -> None:
    """Raise UserError for the first value in which the node `name` differs from the driver."""
    content, versions, described = answer
    for tool, version in expected[1].items():
        if versions.get(tool) != version:
            raise UserError(
                f"{name} has {tool} {versions.get(tool)}, this machine has {version}. The bytes of records depend on "
                "the version. Install the same versions on all nodes (pip install -c constraints.txt), then run the "
                "same command again."
            )
    if described != expected[2]:
        raise UserError(
            f"{name} does not see the same {source} as this machine: {described} on that node, {expected[2]} on this "
            "machine. Put the data on a file system that all nodes mount at the same path."
        )
    if content != expected[0]:
        raise UserError(
            f"{name} does not see the folder {folder} of this machine. Choose a folder on a file system that all nodes "
            "mount at the same path."
        )
