"""Build hook for pip (hatchling): compiles each kernels.c of the packages, if a C compiler is available.

The compiler is $CC or cc. A compiled library runs on any machine with the architecture of the build machine. An x86
compiler that supports target_clones compiles each function twice, with AVX2 and without AVX2. When the library is
loaded, the dynamic linker chooses the version for the CPU.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The -fno options do not change results. Without these options, the compiler must preserve errno and floating-point
# traps, and therefore cannot vectorize some loops. The kernels use neither errno nor traps.
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]


def compile_native(source: Path) -> Path | None:
    """Compile `source` to a library in the same folder. Returns the path of the library, or None if compiling fails.

    The library has the name that prep.compiled.library_path returns. library_path cannot be imported here, because the
    package is not yet installed when pip runs this hook. Libraries of earlier versions of `source` are removed.
    """
    text = source.read_bytes()
    headers = re.findall(rb'^#include "(\w+\.h)"', text, re.MULTILINE)
    text += b"".join(source.with_name(name.decode()).read_bytes() for name in headers)
    library = source.with_name(f"{source.stem}-{sha256(text).hexdigest()[:16]}.so")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            output = Path(folder, library.name)
            for clones in (["-DCLONES"], []):  # some compilers do not support target_clones
                command = [*compiler, *FLAGS, *clones, str(source), "-o", str(output)]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    for old in source.parent.glob(f"{source.stem}-*.so"):
                        old.unlink()
                    output.replace(library)
                    return library
    except OSError:  # for example, there is no compiler, or the folder is read-only
        pass
    return None


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the libraries to the wheel and tags the wheel for this platform. Any Python 3 can load the libraries."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels. hatchling calls this method before it collects the files of the wheel."""
        for source in sorted(Path(self.root).glob("*/*/kernels.c")):
            library = compile_native(source)
            if library is None:
                self.app.display_warning(
                    f"{source.relative_to(self.root)} was not compiled: slower code is used instead"
                )
                continue
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")
            build_data["artifacts"].append(f"/{library.relative_to(self.root)}")
