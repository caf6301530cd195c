"""`alexstream serve`, `status` and `stop`: commands that start, show and stop services in a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.cli.service_text import print_state, ready_line
from prep.console import json_option, print_json, say, store_option, usable_cores

Command = TypeVar("Command", bound=Callable[..., Any])


def _check_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise click.BadParameter(f"{name!r}: expected letters, digits, dots, hyphens and underscores.")
    return name


def _parse_workers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    if match is None:
        raise click.BadParameter(f"{text!r}: expected MIN:MAX or one number.")
    return int(match[1]), int(match[2] or match[1])


def _cluster_option(default: str, choices: str, text: str) -> Callable[[Command], Command]:
    return click.option("--cluster", default=default, show_default=True, metavar=choices, help=text)


def _name_option(default: str | None, text: str) -> Callable[[Command], Command]:
    shown = default is not None
    return click.option("--name", default=default, show_default=shown, callback=_check_name, metavar="NAME", help=text)


_running_cluster_option = _cluster_option(
    "auto",
    "auto|HOST:PORT",
    "Ray cluster of the service: the cluster that this machine belongs to (auto), or the cluster at HOST:PORT.",
)


@click.command("serve")
@store_option
@_name_option("default", "Name of the service. Training runs select the service with: alextrain run --service NAME.")
@_cluster_option(
    "local",
    "local|auto|HOST:PORT",
    "Ray cluster of the workers. local: a new cluster of this machine alone, which ends with this command. auto: the "
    "cluster that this machine belongs to. HOST:PORT: the cluster at this address.",
)
@click.option(
    "--workers",
    callback=_parse_workers,
    metavar="MIN:MAX",
    help="Smallest and largest number of workers, for example 2:32. A single number keeps the number of workers "
    "fixed. With a range, the number of workers follows the load.  [default: 1 to the number of workers for which the "
    "cluster has cores]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of decoding threads in each worker. Ray reserves one core for each thread.",
)
@click.option(
    "--ahead",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Number of steps by which the fastest training run of a stream may be ahead of the slowest. The service "
    "keeps the batches of these steps in memory.",
)
@click.option(
    "--consumers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of training runs that read the same stream. The service makes the first batch when all these runs "
    "have connected, or after 60 s.",
)
@json_option
def serve(
    store: Path,
    name: str,
    cluster: str,
    workers: tuple[int, int] | None,
    threads: int,
    ahead: int,
    consumers: int,
    as_json: bool,
) -> None:
    """Start a service in a Ray cluster. Its workers decode and crop images for training runs.

    With --cluster local, the command runs until Ctrl-C or SIGTERM, then stops the service and exits with code 0. With
    --cluster auto or HOST:PORT, the command returns when the workers are ready, and the service runs until `alexstream
    stop`. Every node with workers needs the store at the same path.

    \b
    Example:
      alexstream serve --store store
      alexstream serve --store /data/store --name imagenet --cluster auto --workers 2:32 --threads 4
    """
    from pipeline.service import control
    from prep.cluster import LOCAL, check_address, connected

    check_address(cluster)
    config = control.make_config(store, name, *(workers or (1, 1)), threads, ahead=ahead, consumers=consumers)
    local = cluster == LOCAL
    if local:
        say("Starting a Ray cluster on this machine.")
    size_bytes = control.object_store_bytes(ahead) if local else None
    with connected(cluster, cores=usable_cores(), object_store_bytes=size_bytes) as ray:
        control.check_cores(ray, config, cluster)
        if workers is None:
            config = replace(config, max_workers=control.most_workers(ray, threads))
        control.start_service(ray, config)
        if local:
            from pipeline.cli.foreground import serve_until_stopped

            serve_until_stopped(ray, config, as_json)
            return
        try:
            state = control.await_workers(ray, config, cluster)
        except BaseException:
            control.stop_service(ray, name, cluster)
            raise
    if as_json:
        print_json(state)
    else:
        print_state(state)
        say(ready_line(state, f"Stop the service with: alexstream stop --name {name} --cluster {cluster}"))


@click.command("status")
@_name_option(None, "Name of the service.  [default: all services of the cluster]")
@_running_cluster_option
@json_option
def status(name: str | None, cluster: str, as_json: bool) -> None:
    """Print the state of the services in a cluster: workers, consumers, queue, decoded images, and unusable nodes.

    \b
    Example:
      alexstream status
      alexstream status --name imagenet --json
    """
    from pipeline.service.client import service_names
    from pipeline.service.control import service_status
    from prep.cluster import connected

    with connected(cluster) as ray:
        names = service_names(ray) if name is None else [name]
        if not names:
            say(f"Cluster {cluster} has no services. Start a service with: alexstream serve --cluster {cluster}")
        for each in names:
            state = service_status(ray, each, cluster)
            if as_json:
                print_json(state)
            else:
                print_state(state)


@click.command("stop")
@_name_option("default", "Name of the service.")
@_running_cluster_option
def stop(name: str, cluster: str) -> None:
    """Stop a service and its workers.

    Training runs with --service-fallback local continue without the service. Other training runs that use the service
    end with an error.

    \b
    Example:
      alexstream stop --name imagenet
    """
    from pipeline.service.control import stop_service
    from prep.cluster import connected

    with connected(cluster) as ray:
        stop_service(ray, name, cluster)
    say(f"Stopped service {name}.")
