"""A Ray cluster: one that runs already, or one of this machine that lives as long as who asked for it.

    joined     this process, connected
    started    a cluster in a process of its own, which several others may join
    shared     all processes of a run, connected to the same one

Ray is imported here and nowhere else at the top of a module; whatever runs on it gets the package from :func:`joined`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from gr.errors import UserError, first_line

if TYPE_CHECKING:  # what runs on a cluster's nodes does without torch
    from gr.processes import Processes

NAMESPACE = "gr"
STARTING_SECONDS, ANSWER_SECONDS, ENDING_SECONDS = 180, 20, 30
PRIVATE = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def import_ray() -> Any:
    """The package, told to keep to itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    imported = "ray" in sys.modules
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"this needs Ray, which is not installed ({first_line(error)}): make setup-ray, or pip install 'gr[ray]'"
        ) from None
    if not hasattr(ray, "is_initialized"):
        where = getattr(ray, "__file__", None) or next(iter(ray.__path__))
        raise UserError(f"'{where}' is called as Ray is and found in its place: give it another name")
    if imported and not ray.is_initialized():
        _read_variables_again()
    return ray


def _read_variables_again() -> None:
    """What Ray took from the environment when it was imported, as the environment has it now."""
    from ray import _raylet
    from ray._private import ray_constants

    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not ray_constants.IS_WINDOWS_OR_OSX
    )


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
        _keep_private()
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    folder = None
    with _own_sigterm():
        try:
            if address is not None:
                _reach(address)
                ray.init(address=address, **quiet)
            else:
                folder = tempfile.mkdtemp(prefix="gr-ray-", dir="/tmp")  # a socket's path has 107 bytes
                for again in (True, False):  # Ray gives a start 30 s, which are few on a busy machine
                    try:
                        ray.init(
                            address="local",
                            num_cpus=cpus,
                            object_store_memory=None if store_mib is None else store_mib << 20,
                            include_dashboard=False,
                            _temp_dir=folder,
                            **quiet,
                        )
                        break
                    except Exception:
                        ray.shutdown()
                        if not again:
                            raise
        except Exception as error:  # Ray's own are of many kinds, some of none
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
def started(*, cpus: int | None = None, store_mib: int | None = None) -> Iterator[str]:
    """The address of a new cluster of this machine, which listens on loopback alone.

    A process of its own holds it, in a session of its own: it ends with the context, or with this process however that
    ends, and no signal to this one's group reaches it.  Processes that join it need the variables PRIVATE as they are
    here.  Raises UserError where none can be started.
    """
    _keep_private()
    import_ray()  # its absence is said here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", "from gr.data.cluster import hold; hold()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert holder.stdin is not None and holder.stdout is not None
    late = threading.Timer(STARTING_SECONDS, holder.kill)
    late.start()
    try:
        holder.stdin.write(json.dumps({"cpus": cpus, "store_mib": store_mib}) + "\n")
        holder.stdin.flush()
        said = next((line for line in holder.stdout if line.startswith("{")), None)
        late.cancel()
        answer = json.loads(said or '{"refused": "no Ray cluster could be started: its process has ended"}')
        if "refused" in answer:
            raise UserError(answer["refused"])
        yield answer["address"]
    finally:
        late.cancel()
        with contextlib.suppress(OSError):
            holder.stdin.close()
        try:
            holder.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(holder.pid, signal.SIGKILL)
            holder.wait()
        holder.stdout.close()


def hold() -> None:
    """The process that holds a cluster: settings come as a line on stdin, the address goes out on stdout, and stdin's
    end is the end."""
    settings = json.loads(sys.stdin.readline())
    try:
        with joined(**settings) as ray:
            print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on
            sys.stdin.read()
    except UserError as error:
        print(json.dumps({"refused": str(error)}), flush=True)


@contextmanager
def shared(
    address: str | None, processes: Processes, *, cpus: int | None = None, store_mib: int | None = None
) -> Iterator[Any]:
    """The package ``ray``, connected to the same cluster on all ``processes``, which enter together; those that leave
    without an error leave together, for what one owns is there for all.

    address, cpus, store_mib: as :func:`joined` has them; with None the main process starts the cluster and the others
    join it.  Raises UserError on all where any can't.
    """
    with ExitStack() as cluster:
        connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        if address is None and not (connected and processes.world.size == 1):
            hosts = dict.fromkeys(processes.everybodys(socket.gethostname()))
            if len(hosts) > 1:
                raise UserError(
                    f"the processes are on {len(hosts)} hosts ({', '.join(hosts)}), and no Ray cluster is named that "
                    "all of them could join: start one (ray start --head on one host, ray start --address=HOST:6379 "
                    "on the others) and set data.ingest.address=HOST:6379",
                    everywhere=True,
                )

            def start() -> dict[str, str] | None:
                if not processes.is_main:
                    return None
                here = cluster.enter_context(started(cpus=cpus, store_mib=store_mib))
                return {"address": here, **{name: os.environ[name] for name in PRIVATE}}

            place = processes.broadcast(processes.together(start))
            assert place is not None
            address = place.pop("address")
            os.environ.update(place)
        with ExitStack() as connection:
            yield processes.together(lambda: connection.enter_context(joined(address)))
            processes.barrier()  # nobody asks for anything any more
        processes.barrier()  # nobody is connected any more


def _keep_private() -> None:
    """Variables for a cluster of this machine alone."""
    # every port on 127.0.0.1; what the name says it's for doesn't matter
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray's own choice (15) lets workers wait for whatever else the machine does, and that is what waits for them
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _reach(address: str) -> None:
    """An OSError where nobody listens at HOST:PORT, of which Ray would say so after minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


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
