"""A Ray cluster: one that runs already, or one of this machine that lives as long as who asked for it.

Ray is imported here and nowhere else at the top of a module; whatever runs on it gets the package from :func:`joined`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gr.data.folder import first_line
from gr.errors import UserError

NAMESPACE = "gr"


def import_ray() -> Any:
    """The package, told to keep to itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"this needs Ray, which is not installed ({first_line(error)}): make setup-ray, or pip install 'gr[ray]'"
        ) from None
    return ray


@contextmanager
def joined(
    address: str | None = None, *, cpus: int | None = None, store_mib: int | None = None
) -> Iterator[Any]:
    """The package ``ray``, connected; disconnected at the end.

    address: "auto" or HOST:PORT of a cluster that runs; None starts one on this machine, which listens on loopback
    alone and ends with the context.  cpus, store_mib: of one that is started; Ray's own choice without them.
    Raises UserError where no cluster answers.  A process that is connected already stays so.
    """
    if address is None:
        # every port on 127.0.0.1; what the name says it's for doesn't matter.  Read when ray is imported first.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    folder = None
    with _own_sigterm():
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                folder = tempfile.mkdtemp(prefix="gr-ray-", dir="/tmp")  # a socket's path has 107 bytes
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    object_store_memory=None if store_mib is None else store_mib << 20,
                    include_dashboard=False,
                    _temp_dir=folder,
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            what = (
                "no Ray cluster could be started"
                if address is None
                else f"no Ray cluster answers at '{address}'"
            )
            raise UserError(
                f"{what} ({first_line(error)}): check the address (ray status), and that RAY_AUTH_MODE and "
                "RAY_AUTH_TOKEN are the cluster's"
            ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own in the place of the program's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
