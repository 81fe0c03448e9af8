"""Connecting to Ray: the cluster that the environment names, else a local one of this machine.

Never sets up a cluster and never stops one that it did not start.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from spa_ray.config.plugs import to_ship
from spa_ray.errors import InputError
from spa_ray.logs import hush, without_rays_level
from spa_ray.pipeline.ray_address import check_address, named_address, refused, short_folder
from spa_ray.storage.files import STORAGE_VARIABLES

FOOTER_READERS = 2
MIN_LOCAL_CPUS = 4  # logical: with fewer, a resumed pass waits behind its own checkpoint actors


@contextmanager
def connected(*, verbose: bool, plugs: Iterable[str] = ()) -> Iterator[None]:
    """Ray for the duration; a local Ray that was started here is shut down at the end.

    `plugs`: dotted paths that a config names; the user's own modules among them are sent to the cluster's nodes.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Reading Parquet starts this many processes to read footers, each time; by default 32, on any machine.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", str(FOOTER_READERS))
    if not verbose:
        hush()
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    quiet = nullcontext() if verbose else without_rays_level()
    address = named_address()
    if address is not None:
        check_address(address)
    if address is not None or os.environ.get("RAY_JOB_ID"):
        storage = {key: os.environ[key] for key in STORAGE_VARIABLES if key in os.environ}
        modules = to_ship(plugs)
        # Nodes know their own keys, not the driver's endpoint.
        there = {**({"env_vars": storage} if storage else {}), **({"py_modules": modules} if modules else {})}
        # A job that was submitted with these variables is no conflict: here they came from there.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        try:
            with quiet, _home():
                ray.init(logging_level=level, log_to_driver=verbose, runtime_env=there or None)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as e:
            lines = str(e).strip().splitlines() or [type(e).__name__]
            raise refused(address or "none", f"Ray cannot be joined ({' '.join(lines)[:300]})") from e
    else:
        cpus = max(MIN_LOCAL_CPUS, os.cpu_count() or 1)
        with _loopback(), quiet, _home():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=level,
                log_to_driver=verbose,
                _temp_dir=short_folder(),
            )
    quiet_ray_data(verbose)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _home() -> Iterator[None]:
    """Raises: InputError for a file of Ray's own, mostly below the home folder, that it cannot make in this block."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            raise
        raise InputError(
            f"{e.filename}: Ray has to write there and cannot ({e.strerror}); set HOME to a folder that can be written"
        ) from e


# Despite its name: whether Ray takes this machine's address on the network for its own, on any system.
ON_NETWORK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that starts in this block, and its processes, listen on the loopback address alone.

    Else its ports, by which code can be run, are open to the network; the variable set to 1 leaves them so.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER  # read off the environment when Ray was imported
    given = os.environ.get(ON_NETWORK)
    os.environ.setdefault(ON_NETWORK, "0")
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[ON_NETWORK] != "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[ON_NETWORK]


def quiet_ray_data(verbose: bool) -> None:
    """Ray Data's and Ray Train's own progress and chatter only when asked for."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if not verbose:
        # Only this deprecated way sets an actor's `max_task_retries`; the pinned Ray still knows it.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a failure is told in one line of ours
