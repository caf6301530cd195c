"""Stop a DALI pipeline and its threads at a known time, with DALI's private method `Pipeline._shutdown`.

The project calls no other private method of DALI. Closing a loader unmaps the store's files. DALI's threads read these
files, so the threads must end before a loader is closed. DALI 2.4 has no public method that stops the threads: leaving
a `with pipeline:` block only ends the definition of the graph, and `release_outputs` stops no thread. Dropping the last
reference to the pipeline also stops its threads, because `Pipeline.__del__` calls `_shutdown`. The traceback of an
exception, however, can keep the pipeline alive. DALI itself calls `_shutdown` when the interpreter exits.

The next major version of DALI can change private methods, so pyproject.toml excludes this version. The tests in
test_dali_shutdown.py fail if DALI lacks the private method, and also if a public method of DALI has the same effect.
"""

from __future__ import annotations

from typing import Any


def shut_down(pipe: Any) -> None:
    """Stop the threads of a built `nvidia.dali.Pipeline` and release its memory.

    The outputs of the pipeline stay valid. The pipeline cannot be used afterwards. A second call has no effect.
    """
    pipe._shutdown()
