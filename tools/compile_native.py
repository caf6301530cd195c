"""What pip runs when it installs the package: compiles the native.c of each room if a C compiler is there.

The compiler is $CC or cc. Where it can make a function for each kind of CPU it does, so that what was built on one
machine runs on any of its architecture, as fast as that allows.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Results are as without: only errno and floating-point traps, which nobody reads, would keep vectors out of loops.
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]


def compile_native(source: Path) -> Path | None:
    """Compile `source` to the library beside it that prep/compiled.py will look for; None where that cannot be done.

    The name is that of compiled.library_path, which cannot be imported: pip builds where the package is not.
    """
    library = source.with_name(f"{source.stem}-{sha256(source.read_bytes()).hexdigest()[:16]}.so")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            made = Path(folder, library.name)
            for clones in (["-DCLONES"], []):
                words = [*compiler, *FLAGS, *clones, str(source), "-o", str(made)]
                if subprocess.run(words, capture_output=True, check=False).returncode == 0:
                    for old in source.parent.glob(f"{source.stem}-*.so"):
                        old.unlink()
                    made.replace(library)
                    return library
    except OSError:  # no such compiler, or a folder that cannot be written to
        pass
    return None


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Adds the libraries to the wheel, which is then one for this platform; any Python 3 can load them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it gathers files."""
        for source in sorted(Path(self.root).glob("*/*/kernels.c")):
            library = compile_native(source)
            if library is None:
                self.app.display_warning(f"{source.relative_to(self.root)} was not compiled: what it does takes longer")
                continue
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")
            build_data["artifacts"].append(f"/{library.relative_to(self.root)}")
