"""Tests of the errors of loaders and services: wrong names, stores, versions, arrays and settings; missing Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.loader import eval_loader, train_loader
from pipeline.service import client
from pipeline.service.client import parse_service
from pipeline.service.control import make_config, start_service, stop_service
from pipeline.service.errors import ServiceError
from pipeline.service.protocol import PROTOCOL_VERSION, Answer, ServiceConfig, checked_windows
from pipeline.windows import WindowRequest
from prep.cluster import AUTO
from prep.console import UserError
from prep.store.extra import Column
from prep.store.manifest import StoreError
from tests.pipeline.service.conftest import Serve, Service, TestCluster


@pytest.fixture(scope="module")
def service(store: Path, module_serve: Serve) -> Service:
    return module_serve(store, 1)


def test_names_of_services() -> None:
    assert parse_service("imagenet") == ("imagenet", AUTO)
    assert parse_service("imagenet@head:6379") == ("imagenet", "head:6379")
    for wrong in ("", "@head:6379", "imagenet@"):
        with pytest.raises(ServiceError, match=re.escape(f"service {wrong!r}: expected NAME or NAME@HOST:PORT.")):
            parse_service(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_workers": 3, "max_workers": 2}, "workers 3:2: expected MIN:MAX"),
        ({"min_workers": -1}, "workers -1:1"),
        ({"min_workers": 0, "max_workers": 0}, "workers 0:0"),
        ({"threads": 0}, "threads 0, ahead 16, consumers 1"),
        ({"ahead": 0}, "ahead 0, consumers 1: expected threads and consumers of at least 1, and ahead of 1 to 1024"),
        ({"ahead": 1025}, "ahead 1025"),
        ({"consumers": 0}, "consumers 0"),
    ],
)
def test_settings_of_a_service_that_are_not_allowed(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ServiceConfig("name", "/store", {}, **settings)


def test_a_service_that_does_not_exist(store: Path, service: Service) -> None:
    address = service.cluster.address
    with pytest.raises(ServiceError) as refused:
        train_loader(store, 4, service=f"other@{address}")
    assert str(refused.value).startswith(f"service other: cluster {address} has no such service (services of the ")
    assert service.name in str(refused.value) and "alexstream serve --store STORE --name other" in str(refused.value)


def test_a_name_that_is_taken(store: Path, service: Service) -> None:
    with pytest.raises(
        ServiceError, match=f"already has a service of this name. Stop the service with: .* {service.name}"
    ):
        start_service(service.cluster.ray, make_config(store, service.name, 1, 1, 1))
    assert service.status()["name"] == service.name  # the existing service is still running


def test_a_service_that_was_stopped_can_be_started_again(cluster: TestCluster, store: Path, serve: Serve) -> None:
    name = serve(store, 0, 1).name
    stop_service(cluster.ray, name, cluster.address)
    with pytest.raises(ServiceError, match="no such service"):
        stop_service(cluster.ray, name, cluster.address)
    start_service(cluster.ray, make_config(store, name, 0, 1, 1))
    stop_service(cluster.ray, name, cluster.address)


def test_a_service_of_another_store(numbered_store: Path, service: Service) -> None:
    with pytest.raises(ServiceError) as refused:
        eval_loader(numbered_store, 4, service=service.at)
    theirs = service.status()["fingerprints"]["val"]
    with eval_loader(numbered_store, 4) as local:
        ours = local.store.split("val").fingerprint
    assert f"fingerprint {theirs[:16]} in {service.store}, the store of this loader has {ours[:16]}" in str(
        refused.value
    )


def test_a_service_of_another_version(store: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    ours, theirs = PROTOCOL_VERSION + 1, PROTOCOL_VERSION
    with pytest.raises(ServiceError, match=rf"\(protocol {theirs}\), this program is .* \(protocol {ours}\)\. Install"):
        train_loader(store, 4, service=service.at)


def test_the_fallback_needs_the_shards(store: Path, service: Service, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="service fallback 'remote': expected local"):
        train_loader(store, 4, service=service.at, service_fallback="remote")
    shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("[0-9]*"))
    with pytest.raises(StoreError, match="train/00000"):
        train_loader(tmp_path / "store", 4, service=service.at, service_fallback="local")
    with (
        train_loader(tmp_path / "store", 4, service=service.at, threads=1) as without_shards,
        train_loader(store, 4, threads=1) as local,
    ):
        assert next(iter(without_shards)).labels.tolist() == next(iter(local)).labels.tolist()


PIXELS, LABELS = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS[:1], LABELS, "sent pixels as uint8 (1, 4, 4, 3), expected uint8 (2, 4, 4, 3)"),
        (PIXELS.astype(np.int8), LABELS, "sent pixels as int8 (2, 4, 4, 3)"),
        (PIXELS.transpose(0, 2, 1, 3), LABELS, "sent pixels as"),
        (PIXELS.tobytes(), LABELS, "sent pixels as bytes"),
        (None, LABELS, "sent pixels as NoneType"),
        (PIXELS, LABELS.astype(np.int32), "sent labels as int32 (2,), expected int64 (2,)"),
        (PIXELS, LABELS[:, None], "sent labels as int64 (2, 1)"),
        (PIXELS, None, "sent labels as NoneType"),
    ],
    ids=range(8),
)
def test_arrays_of_another_type_or_shape(pixels: Any, labels: Any, message: str) -> None:
    request = WindowRequest("train", np.zeros(2, np.int64), np.zeros((2, 2), np.int32), 4)
    with pytest.raises(ServiceError, match=re.escape(f"service s {message}")):
        checked_windows("s", pixels, Answer(labels=labels), request)
    assert checked_windows("s", PIXELS, Answer(labels=LABELS), request).pixels is PIXELS


@pytest.mark.parametrize(("asked", "sources"), [(True, ()), (True, ("a",)), (False, ("a", "b"))])
def test_another_number_of_source_paths(asked: bool, sources: tuple[str, ...]) -> None:
    request = WindowRequest("train", np.zeros(2, np.int64), np.zeros((2, 2), np.int32), 4, with_sources=asked)
    message = f"service s sent {len(sources)} source paths, expected {2 * asked}"
    with pytest.raises(ServiceError, match=message):
        checked_windows("s", PIXELS, Answer(labels=LABELS, sources=sources), request)


_AGES = Column("int", np.zeros(2, np.int64))
_TEXTS = Column.of_texts([b"a", b"bc"])


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "sent the extra fields none, expected age, text"),
        ({"age": _AGES, "text": _TEXTS, "more": _AGES}, "sent the extra fields age, more, text"),
        ({"age": _TEXTS, "text": _TEXTS}, "sent extra field age as uint8 (3,), expected int64 (2,)"),
        ({"age": Column("int", np.zeros(3, np.int64)), "text": _TEXTS}, "sent extra field age as int64 (3,)"),
        ({"age": _AGES, "text": _AGES}, "sent extra field text as NoneType, expected int64 (3,)"),
        ({"age": _AGES, "text": Column("text", _TEXTS.values, np.array([0, 3, 2]))}, "that do not ascend"),
        (
            {"age": _AGES, "text": Column("text", _TEXTS.values[:2], _TEXTS.offsets)},
            "as uint8 (2,), expected uint8 (3,)",
        ),
    ],
)
def test_other_extra_fields_than_the_manifest_describes(sent: dict[str, Column], message: str) -> None:
    fields = {"age": _AGES.entry(), "text": _TEXTS.entry()}
    request = WindowRequest("train", np.zeros(2, np.int64), np.zeros((2, 2), np.int32), 4, extra_fields=fields)
    with pytest.raises(ServiceError, match=re.escape(message)):
        checked_windows("s", PIXELS, Answer(labels=LABELS, extra=sent), request)
    intact = {"age": _AGES, "text": _TEXTS}
    assert checked_windows("s", PIXELS, Answer(labels=LABELS, extra=intact), request).extra == intact


def test_without_ray(store: Path) -> None:
    """In the subprocess, Ray cannot be imported. A loader without a service still works."""
    script = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "from pipeline import train_loader\n"
        "from prep.console import UserError\n"
        "with train_loader(sys.argv[1], 8, threads=1) as loader:\n"
        "    print(len(list(loader)))\n"
        "try:\n"
        "    train_loader(sys.argv[1], 8, service='imagenet')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(store)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "3",
        "Ray is not installed. Install Ray with: pip install 'ray[default]>=2.60,<3'",
    ]
