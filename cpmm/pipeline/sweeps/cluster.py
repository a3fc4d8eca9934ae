"""Ray for a sweep: one of our own, or a running cluster; with time-outs where it could hang."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cpmm.pipeline.config.code import PACKAGE

REFUSED = "InvalidAuthToken"  # in what Ray says where a token is missing or wrong
OUTER_CPU = 0.01  # of a trial whose workers train together, taken from theirs; Tune refuses 0
TOKEN = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}  # what decides on tokens
CODE = {  # our package is sent to the workers of a cluster: they need no checkout
    "py_modules": [str(PACKAGE)],
    "excludes": ["__pycache__"],
    "env_vars": {"RAY_TRAIN_V2_ENABLED": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"},
}
LONGEST = 43  # bytes of the folder of Ray's sessions: a socket's path may have 107
ROOM_BYTES = 32 * 2**20  # of the logs of a short sweep
SPARE_BYTES = 256 * 2**20  # of the object store, beside the inputs
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Our records say what is done; Tune's own state is written, but never read again.
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "RAY_AIR_NEW_OUTPUT": "0",  # our own table instead
    # Reports from a curriculum's spaces, and signs of life, have no density to compare trials by.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not Tune's part of it alone
    "RAY_TRAIN_V2_ENABLED": "1",
}


def prepare_environment(options: dict[str, Any]) -> None:
    """Set what Ray reads from the environment when it is imported: call this before.

    A Ray of our own listens on the loopback interface alone. A running cluster is asked whether it
    wants a token: in the wrong mode, it refuses, or lets us in and then loses every worker.

    Raises:
        ConnectionError: If no cluster answers in time.
    """
    if address := _address(options):
        mode = _find_mode(address, options["connect_seconds"])
        os.environ.setdefault("RAY_AUTH_MODE", mode)
    else:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        kept = Path("~/.ray/auth_token")  # by Ray, unless it is given one
        if not TOKEN & os.environ.keys() and not _can_write(Path(os.path.expanduser(kept))):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _address(options: dict[str, Any]) -> str | None:
    """Address of a running cluster, None for a Ray of our own."""
    address = options["address"] or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


@contextmanager
def connected(options: dict[str, Any], input_bytes: int, cpus_at_least: float) -> Iterator[str]:
    """Start Ray, or attach to a running cluster, for the time of a sweep.

    :func:`prepare_environment` was called before.

    Args:
        options: The section ``ray``.
        input_bytes: What the object store must hold.
        cpus_at_least: A Ray of our own offers as many CPUs, even if the machine has fewer.

    Yields:
        A line that says what was started or found.

    Raises:
        ConnectionError: If no cluster answers in time, or a Ray of our own does not start.
    """
    import ray

    address = _address(options)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = _own_folder() if address is None else None
    started = time.monotonic()
    if address is not None:
        try:
            context = ray.init(address=address, runtime_env=CODE, **quiet)
        except (ConnectionError, RuntimeError) as error:
            said = f"cannot attach to the Ray cluster at {address}: {error}"
            raise ConnectionError(said) from error
        what = f"attached to {context.address_info['gcs_address']}"
    else:
        store = options["object_store_gb"]
        size = int(store * 2**30) if store else int(1.25 * input_bytes) + SPARE_BYTES
        try:
            context = ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus_at_least)),
                object_store_memory=size,
                include_dashboard=options["dashboard"],
                dashboard_host="127.0.0.1",
                _temp_dir=own,
                **quiet,
            )
        except (RuntimeError, TimeoutError) as error:
            lines = str(error).strip().splitlines()[:1]
            raise ConnectionError(
                f"Ray did not start ({''.join(lines)}): its logs are in {own or _sessions()}; "
                "RAY_TMPDIR sets another folder"
            ) from error
        what = "started Ray"
        if url := context.dashboard_url:
            what += f", dashboard http://{url} (`ray get-auth-token` prints its token)"
    # Ray's own handler dumps stacks and aborts; set after ray.init, this one ends like Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        total = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield (
            f"{what} | {nodes} node{'s' if nodes > 1 else ''}, {total.get('CPU', 0):g} CPUs, "
            f"{total.get('GPU', 0):g} GPUs | {time.monotonic() - started:.1f} s"
        )
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _own_folder() -> str | None:
    """Make a private folder for Ray's sessions where its own choice is too long or not writable.

    Raises:
        OSError: If there is no place for one.
    """
    sessions = _sessions()
    if len(os.fsencode(sessions)) <= LONGEST and _has_room(sessions):
        return None
    for place in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"):
        short = place and Path(place).is_absolute() and len(os.fsencode(place)) <= LONGEST - 15
        if short and _has_room(Path(place)):
            with suppress(OSError):
                return tempfile.mkdtemp(prefix="cpmm-", dir=place)  # for this user alone
    raise OSError(
        f"Ray cannot keep its sockets in {sessions}, which is not writable, full or longer than "
        f"{LONGEST} bytes, nor in /tmp: set RAY_TMPDIR to a short folder with "
        f"{ROOM_BYTES >> 20} MiB of room"
    )


def _sessions() -> Path:
    """Where Ray keeps its sessions by itself."""
    return (
        Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute() / "ray"
    )


def _has_room(folder: Path) -> bool:
    """Whether a folder, or where it would be made, can be written to and is not full."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return _can_write(folder / "session") and shutil.disk_usage(there).free > ROOM_BYTES


def _can_write(path: Path) -> bool:
    """Whether a file can be written, or made where there is none; not where no home is known."""
    if not path.is_absolute() or path.exists():
        return path.exists() and os.access(path, os.R_OK | os.W_OK)
    there = next(place for place in path.parents if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def resources(options: dict[str, Any]) -> dict[str, float]:
    """CPUs and GPUs of one worker: a GPU each if the cluster has any and nothing else is asked."""
    import ray

    given = options["gpus"]
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0) if given is None else given
    return {"CPU": options["cpus"], "GPU": gpus}


def wait_for_resources(worker: dict[str, float], options: dict[str, Any]) -> None:
    """Wait until some node of the cluster could hold a worker.

    Raises:
        TimeoutError: If none can after ``ray.resources_seconds``.
    """
    import ray

    deadline = time.monotonic() + options["resources_seconds"]
    needed = {name: amount for name, amount in worker.items() if amount}
    while True:
        offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(o.get(n, 0) >= a for n, a in needed.items()) for o in offers):
            return
        if time.monotonic() > deadline:
            offered = [{n: o.get(n, 0) for n in ("CPU", "GPU")} for o in offers]
            raise TimeoutError(
                f"a trial's worker asks for {needed}, but no node offers that ({offered}): lower "
                "ray.cpus or ray.gpus, or add a node"
            )
        time.sleep(1)


def n_at_once(worker: dict[str, float], options: dict[str, Any]) -> int:
    """Number of trials that fit into the cluster now, all their workers counted, at least one."""
    import ray

    total = ray.cluster_resources()
    fits = min(total.get(name, 0) / amount for name, amount in worker.items() if amount)
    return max(1, int(fits / options["workers"] + 1e-6))


def _find_mode(address: str, seconds: float) -> str:
    """Find out with which ``RAY_AUTH_MODE`` the cluster answers: disabled, or token.

    It is asked by processes of their own, since a half-dead head can hang whoever asks.
    """
    print(f"sweep | asking the Ray cluster at {address}", flush=True)
    given = os.environ.get("RAY_AUTH_MODE")
    deadline = time.monotonic() + seconds
    refused = _refused(address, seconds)
    answer = refused
    for mode in [] if refused else [given] if given else ["disabled", "token"]:
        answer = _ask(address, mode, deadline)
        if answer is None:
            return mode
        if REFUSED not in answer or mode == "token":
            break
    if time.monotonic() > deadline:
        answer = f"no answer within {seconds:g} s, ray.connect_seconds"
    raise ConnectionError(
        f"cannot attach to a Ray cluster at {address} ({answer}): start one with "
        "`ray start --head`, correct ray.address or RAY_ADDRESS, or leave both out for a Ray of "
        "the sweep's own; a cluster with tokens needs its token here, in ~/.ray/auth_token or "
        "RAY_AUTH_TOKEN"
    )


def _refused(address: str, seconds: float) -> str | None:
    """Whether nothing listens at ``host:port``: Ray itself would try for most of a minute."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=seconds).close()
    except OSError as error:
        return str(error)
    return None


def _ask(address: str, mode: str, deadline: float) -> str | None:
    """Ask a cluster for its health; None if it is well, else what was said."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += [] if address == "auto" else ["--address", address]
    with tempfile.TemporaryFile("w+") as said:
        environment = {**os.environ, "RAY_AUTH_MODE": mode}
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            said.seek(0)
            # It would try again for 20 s.
            if time.monotonic() > deadline or REFUSED in said.read():
                process.kill()
                process.wait()
            time.sleep(0.1)
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if process.returncode == 0:
        return None
    refused = [line for line in lines if REFUSED in line]
    return (refused or lines or ["no reason given"])[-1].strip()
