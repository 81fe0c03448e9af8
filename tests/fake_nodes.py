"""The node provider of tests/fake_cluster.py: Ray's fake one, with a folder of its own for each node's runtime envs.

Ray's fake nodes share one, and each new node unpacks a job's working directory anew, from under the running processes.
Ray's monitor process imports this module by itself: nothing else of the tests may be imported here.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class SeparateNodes(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        params = partial(RayParams, runtime_env_dir_name=f"runtime_resources_{self._next_node_id}")
        with patch("ray._private.parameter.RayParams", params):
            super()._create_node_with_resources_and_labels(*arguments)
