"""The path of the project's root folder, and command lines for commands in Linux namespaces."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def own_namespaces(*kinds: str) -> list[str]:
    """Return the beginning of a command line that runs a command in its own Linux namespaces.

    kinds  kinds of namespaces, such as "--mount"

    Skips the test if this machine does not permit namespaces, as some containers and distributions do not.
    """
    command = ["unshare", *kinds, *([] if os.geteuid() == 0 else ["--map-root-user"])]
    try:
        permitted = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        permitted = False
    if not permitted:
        pytest.skip("this machine does not permit Linux namespaces")
    return command
