"""Inputs that each node pulls by hash from the DVC remote, once, into a cache of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import yaml
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpmm.pipeline.config.fingerprints import hash_of
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.sweeps.inputs import Located
from cpmm.pipeline.sweeps.shared import SharedInputs, share

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from cpmm.pipeline.sweeps.shared import SharedSpaces

PULL_SECONDS = 3600


@dataclass(frozen=True)
class RemoteInput:
    """How any node gets the inputs."""

    outs: tuple[dict[str, Any], ...]  # what ``dvc.lock`` says of each: its path, hash and size
    remote: dict[str, Any]  # options of the DVC remote, its url among them
    cache: str  # folder of the node-local cache
    located: Located  # where the driver's node has them; the fingerprints that they must have


@dataclass(frozen=True)
class RemoteInputs:
    """Inputs that a trial gets from the cache of its node; ``caches`` is an actor's handle."""

    caches: Any

    def load(self) -> tuple[DataSplits, SharedSpaces | None]:
        """Get them on any node of the cluster."""
        node = ray.get_runtime_context().get_node_id()
        cache = ray.get(self.caches.of_node.remote(node))
        try:
            return ray.get(cache.shared.remote(), timeout=PULL_SECONDS).load()
        except RayActorError:
            ray.get(self.caches.forget.remote(node))  # the next trial there tries anew
            raise


class NodeCache:
    """Puts the inputs into its node's object store, once for all trials there."""

    def __init__(self, remote_input: RemoteInput, at_home: bool) -> None:
        self._shared = share(remote_input.located if at_home else pull(remote_input))

    def shared(self) -> SharedInputs:
        """References to them."""
        return self._shared


class NodeCaches:
    """Starts a cache on each node that asks; they live as long as this actor, that is the sweep."""

    def __init__(self, remote_input: RemoteInput, home: str) -> None:
        self.remote_input, self.home = remote_input, home
        self.by_node: dict[str, Any] = {}

    def of_node(self, node: str) -> Any:
        """Handle of a node's cache."""
        if node not in self.by_node:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            actor = ray.remote(num_cpus=0, max_restarts=-1)(NodeCache)
            actor = actor.options(scheduling_strategy=there)
            self.by_node[node] = actor.remote(self.remote_input, node == self.home)
        return self.by_node[node]

    def forget(self, node: str) -> None:
        """Start another cache on the node next time."""
        self.by_node.pop(node, None)


def push(located: Located, cache: str) -> RemoteInputs | None:
    """Push inputs to the default DVC remote for every node to pull; None for what DVC lacks.

    Raises:
        ValueError: If the project has no default remote, or the push fails.
    """
    folders = [f for f in (located.prepared, located.spaces) if f is not None]
    lock = ROOT / "dvc.lock"
    stages = (yaml.safe_load(lock.read_text()) if lock.is_file() else {}).get("stages") or {}
    known = {out["path"]: out for stage in stages.values() for out in stage.get("outs", [])}
    paths = [str(f.relative_to(ROOT)) if f.is_relative_to(ROOT) else "" for f in folders]
    if not all(path in known for path in paths):
        return None
    remote = default_remote()
    run_dvc(ROOT, "push", *paths)
    home = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(home, soft=False)
    actor = ray.remote(num_cpus=0)(NodeCaches).options(scheduling_strategy=here)
    remote_input = RemoteInput(tuple(known[path] for path in paths), remote, cache, located)
    return RemoteInputs(actor.remote(remote_input, home))


def pull(inputs: RemoteInput) -> Located:
    """Pull inputs into this node's cache; DVC checks every file against its hash.

    A cache of the same hashes is used as it is; the artifacts' seals are checked when it is opened.
    """
    fingerprint = hash_of(inputs.outs)
    root = Path(inputs.cache).expanduser() / fingerprint
    paths = [root / out["path"] for out in inputs.outs]
    if not (root / "complete").is_file():
        _make_repository(root, inputs)
        try:
            run_dvc(root, "pull", "--force")
        except ValueError as error:
            raise ValueError(
                f"node {ray.util.get_node_ip_address()} cannot get the inputs: on the DVC remote "
                f"they are out of reach, missing, or do not have their hashes: {error}"
            ) from error
        finally:
            (root / ".dvc" / "config.local").unlink(missing_ok=True)  # it may hold credentials
        (root / "complete").touch()
    return Located(paths[0], paths[1] if len(paths) > 1 else None, inputs.located.fingerprints)


def _make_repository(root: Path, inputs: RemoteInput) -> None:
    """Make a DVC repository that knows nothing but the inputs, one .dvc file for each."""
    from dvc.config import Config
    from dvc.repo import Repo

    if not (root / ".dvc").is_dir():
        root.mkdir(parents=True, exist_ok=True)
        Repo.init(str(root), no_scm=True).close()
    shutil.rmtree(root / ".dvc" / "tmp", ignore_errors=True)  # locks of a pull that was killed
    (root / ".dvc" / "config.local").touch(mode=0o600)  # it may hold credentials
    config = Config(str(root / ".dvc"))
    with config.edit("local", validate=False) as local:
        local["core"] |= {"remote": "origin", "analytics": False, "check_update": False}
        local["remote"]["origin"] = {**inputs.remote, "verify": True}
    for out in inputs.outs:
        path = root / out["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        spec = {"outs": [{**{k: v for k, v in out.items() if k != "path"}, "path": path.name}]}
        path.with_name(path.name + ".dvc").write_text(yaml.safe_dump(spec))


def default_remote() -> dict[str, Any]:
    """Options of the project's default DVC remote.

    Raises:
        ValueError: If it has none.
    """
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        name = repo.config["core"].get("remote")
        if not name:
            raise ValueError(
                "ray.inputs is remote, but the project has no default DVC remote: add one with "
                "`dvc remote add --local -d NAME URL`, or set ray.inputs=driver"
            )
        return dict(repo.config["remote"][name])


def run_dvc(folder: Path, *arguments: str) -> None:
    """Run dvc.

    Raises:
        ValueError: If it fails, with its last words, or takes longer than :data:`PULL_SECONDS`.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True,
            timeout=PULL_SECONDS, check=False, env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"`dvc {' '.join(arguments)}` did not end within {PULL_SECONDS} s in {folder}: "
            "is the remote in reach?"
        ) from error
    if done.returncode:
        # What follows the first error names the targets, on lines of their own.
        at = done.stderr.find("ERROR")
        said = done.stderr[at:][:500] if at >= 0 else done.stderr[-500:]
        raise ValueError(
            f"`dvc {' '.join(arguments)}` failed in {folder}: {' '.join(said.split())}"
        )
