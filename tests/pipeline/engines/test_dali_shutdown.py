"""DALI's private method `Pipeline._shutdown` exists, has no public replacement, and stops all threads."""

from __future__ import annotations

import os

import numpy as np

from pipeline.device import dali
from pipeline.engines.dali_shutdown import shut_down


def test_dali_has_the_private_method_and_no_public_one() -> None:
    """If this test fails because DALI has a public method, use that method in pipeline/engines/dali_shutdown.py."""
    pipeline = dali().Pipeline
    assert callable(pipeline._shutdown)
    public = {name for name in dir(pipeline) if not name.startswith("_")}
    assert not public & {"close", "shutdown", "shut_down", "stop", "terminate", "destroy", "teardown"}


def test_threads_end_while_the_pipeline_is_still_referenced_and_outputs_stay() -> None:
    before = set(os.listdir("/proc/self/task"))
    pipe = dali().Pipeline(batch_size=2, num_threads=3, device_id=None, exec_dynamic=True)
    with pipe:
        pipe.set_outputs(dali().fn.external_source(name="x", no_copy=True) + 1.0)
    pipe.build()
    pipe.feed_input("x", [np.zeros(4, np.float32), np.ones(4, np.float32)])
    (output,) = pipe.run()
    assert len(set(os.listdir("/proc/self/task")) - before) >= 3
    shut_down(pipe)
    assert not set(os.listdir("/proc/self/task")) - before
    assert np.array_equal(output.as_array(), [[1] * 4, [2] * 4])
    shut_down(pipe)
