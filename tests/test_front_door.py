"""Tests that the changelog, CITATION.cff, CI, hooks, Dockerfile and CONTRIBUTING.md agree with the project."""

from __future__ import annotations

import re
import shlex
import tomllib
from datetime import date
from typing import Any

import yaml

from tests.helpers.project import ROOT
from tests.test_layering import ROOMS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Names of the sections in Keep a Changelog 1.1.0.
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def commands_of_target(target: str) -> list[str]:
    """Return the programs of .venv that a target of the Makefile runs. A subcommand is included, as in `ruff check`."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert lines
    return re.findall(r"\$\(BIN\)/([\w-]+(?: [a-z]+)*(?: --check)?)", lines[1])


def docker_instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each instruction of the Dockerfile. Continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line]


def test_changelog_begins_with_unreleased_and_dates_every_version() -> None:
    first, *versions = re.findall(r"^## (.*)$", CHANGELOG, re.M)
    assert first == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", version) for version in versions]
    assert dated and all(dated), versions
    days = [date.fromisoformat(match[2]) for match in dated if match]
    assert days == sorted(days, reverse=True)


def test_changelog_has_an_entry_for_the_version_of_the_package() -> None:
    assert f"## [{PROJECT['version']}] - " in CHANGELOG


def test_every_version_in_the_changelog_has_known_sections_each_once_and_none_empty() -> None:
    for version in CHANGELOG.split("\n## ")[1:]:
        sections = re.findall(r"^### (.*)$", version, re.M)
        assert set(sections) <= SECTIONS and len(sections) == len(set(sections)), version.splitlines()[0]
        assert all("\n- " in text for text in version.split("\n### ")[1:]), version.splitlines()[0]


def test_citation_names_this_version_and_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert f"## [{citation['version']}] - {citation['date-released']}" in CHANGELOG
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Krizhevsky", "Sutskever", "Hinton"]
    assert (paper["year"], paper["volume"], paper["start"], paper["end"]) == (2012, 25, 1097, 1105)


def test_ci_runs_lint_tests_and_docs_on_every_python_that_the_package_declares() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    declared = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert job["strategy"]["matrix"]["python"] == declared == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={declared[0]}"
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert {"make lint", "make test", "make docs"} <= set(commands)


def test_ci_has_read_permission_only_a_time_limit_and_a_version_for_every_action() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert job["timeout-minutes"] <= 60
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_pre_commit_hooks_run_the_programs_of_make_lint() -> None:
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert all(hook["language"] == "system" for hook in hooks)
    entries = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks]
    assert entries == commands_of_target("lint")


def test_docker_image_runs_without_privileges_and_has_a_health_check() -> None:
    instructions = docker_instructions()
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    final = dict(instructions[last + 1 :])
    uid, gid = (int(number) for number in final["USER"].split(":"))
    assert uid >= 10_000 and gid >= 10_000
    assert final["HEALTHCHECK"].endswith('CMD ["alexprep", "--version"]')
    created = [arguments for name, arguments in instructions if name == "RUN" and "useradd" in arguments]
    assert [f"--uid {uid}" in arguments for arguments in created] == [True]


def test_docker_image_has_the_version_of_the_package() -> None:
    labels = next(arguments for name, arguments in docker_instructions() if name == "LABEL")
    assert (
        dict(label.split("=", 1) for label in shlex.split(labels))["org.opencontainers.image.version"]
        == (PROJECT["version"])
    )


def test_docker_image_has_a_compiler_only_to_build_and_for_triton() -> None:
    stage, with_gcc = "", []
    for name, arguments in docker_instructions():
        if name == "FROM":
            stage = arguments.rpartition(" ")[2]
        elif name == "RUN" and " gcc " in arguments:
            with_gcc.append(stage)
    assert with_gcc == ["build", "runtime-cuda13"]


def test_docker_build_context_has_exactly_the_files_that_the_image_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    included = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for name, arguments in docker_instructions()
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied == included
    assert all((ROOT / source).exists() for source in copied)
    assert "*" in lines and {"prep", "pipeline", "train", "pyproject.toml", "LICENSE"} <= copied


def test_contributing_guide_names_every_room_of_the_layering_test() -> None:
    table = CONTRIBUTING[CONTRIBUTING.index("| package |") : CONTRIBUTING.index("`tests/test_layering.py` reads")]
    for package, rooms in ROOMS.items():
        for room in rooms:
            path = ROOT / room.replace(".", "/")
            if path.is_dir():
                assert f"`{path.name}/`" in table, f"{package}/{path.name}/"


def test_contributing_guide_names_files_that_exist() -> None:
    files = [str(path.relative_to(ROOT)) for top in (*ROOMS, "tests", "tools") for path in (ROOT / top).rglob("*")]
    names = re.findall(r"`([\w./]+\.(?:py|c))`", CONTRIBUTING)
    assert names
    assert [name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []
    modules = re.findall(r"python -m (tools[\w.]+)", CONTRIBUTING)
    assert [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] == []
