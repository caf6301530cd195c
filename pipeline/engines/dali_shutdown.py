"""Stop a DALI pipeline at a known time. The only call of a private method of DALI: `Pipeline._shutdown`.

A loader unmaps the store's files when it is closed. DALI's threads read these files, so they must have ended before.
DALI 2.4 has no public method for that: leaving a `with pipeline:` block only ends the definition of its graph, and
`release_outputs` stops no thread. Dropping the last reference does stop them (`Pipeline.__del__` calls `_shutdown`),
but an exception's traceback can keep the pipeline alive. DALI itself calls `_shutdown` when the interpreter exits.

pyproject.toml bounds DALI by the next major version for this reason. tests/pipeline/engines/test_dali_shutdown.py fails
with a DALI that lacks the method, and with one that has a public method to use instead.
"""

from __future__ import annotations

from typing import Any


def shut_down(pipe: Any) -> None:
    """End the threads of a built `nvidia.dali.Pipeline` and release its memory; its outputs stay valid.

    The pipeline cannot be used afterwards. Calling this twice is harmless.
    """
    pipe._shutdown()
