"""Runs a service until Ctrl-C, SIGTERM or `alexstream stop`, in a Ray cluster that consists of this machine alone."""

from __future__ import annotations

import time
from contextlib import suppress
from types import ModuleType
from typing import Any

from pipeline.cli.service_text import print_state, progress_line
from pipeline.service.client import service_names
from pipeline.service.control import await_workers, service_status, stop_service
from pipeline.service.errors import ServiceError
from pipeline.service.protocol import ServiceConfig
from prep.cluster import LOCAL
from prep.console import Terminated, print_json, say

_EVERY_S = 5.0  # interval between two lines of progress
_LEAVE_S = 6.0  # time that loaders get to notice that the service was stopped, and to leave the cluster
_LOOK_S = 1.0  # interval between two checks of whether the service was stopped


def serve_until_stopped(ray: ModuleType, config: ServiceConfig, as_json: bool) -> None:
    """Print the progress of a service until Ctrl-C, SIGTERM or `alexstream stop`, then stop the service.

    Raises ServiceError if no worker can serve the store.
    """
    try:
        state = await_workers(ray, config, LOCAL)
        address = ray.get_runtime_context().gcs_address
        _print_ready(state, address, as_json)
        _print_progress(ray, state, as_json)
        say(f"Service {config.name} was stopped. The Ray cluster of this machine ends, too.")
    except (KeyboardInterrupt, Terminated):
        say(f"Stopping service {config.name} and the Ray cluster of this machine.")
    finally:
        _stop(ray, config.name)


def _stop(ray: ModuleType, name: str) -> None:
    """Stop the service. If it had consumers (loaders that read from the service), sleep _LEAVE_S, so that they can
    leave.

    When the cluster ends, Ray kills the process of each consumer that has not left the cluster.
    """
    # The calls raise an error if Ctrl-C, which signals all processes of the terminal, has already ended the cluster.
    with suppress(ServiceError, TimeoutError, ray.exceptions.RayError):
        if name in service_names(ray):
            consumers = service_status(ray, name, LOCAL)["consumers"]
            stop_service(ray, name, LOCAL)
            time.sleep(_LEAVE_S if consumers else 0)


def _print_ready(state: dict[str, Any], address: str, as_json: bool) -> None:
    name = state["name"]
    if as_json:
        print_json({"address": address, "images_per_s": 0.0, **state})
        return
    print_state(state)
    say(
        f"Service {name} is ready for training runs on this machine: alextrain run --service {name} (if several Ray "
        f"clusters run here: --service {name}@{address}). Press Ctrl-C to stop the service."
    )


def _print_progress(ray: ModuleType, state: dict[str, Any], as_json: bool) -> None:
    """Print a line of progress every _EVERY_S. A line that equals the previous line is not printed.

    Returns when the service has been stopped.
    """
    name, last, printed_s, shown = state["name"], state, time.monotonic(), ""
    while True:
        time.sleep(_LOOK_S)
        if name not in service_names(ray):
            return
        elapsed_s = time.monotonic() - printed_s
        if elapsed_s < _EVERY_S:
            continue
        try:
            state = service_status(ray, name, LOCAL)
        except ServiceError as error:  # the service was stopped or is too busy to answer
            say(str(error))
            continue
        images_per_s = (state["images_made"] - last["images_made"]) / elapsed_s
        last, printed_s = state, time.monotonic()
        if as_json:
            print_json({"images_per_s": round(images_per_s, 1), **state})
        elif (line := progress_line(state, images_per_s)) != shown:
            shown = line
            say(line)
