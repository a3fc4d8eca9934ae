"""A sweep on two nodes that share nothing: neither network, nor files, memory or processes."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT, TINY, copy_project, project_environment

pytestmark = pytest.mark.slow

HEAD, OTHER = "10.77.0.1", "10.77.0.2"
CLUSTER, SERVER = f"{HEAD}:6379", f"{HEAD}:5000"
TOKEN = "0123456789abcdef" * 4
SECRET = "secret-of-the-test"
OTHER_HOME = "/tmp/home"  # in the other node's own /tmp
SWEEP_COMMAND = ["workflows/sweep.py", "sweep=nodes"]
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
SWEEP = {
    "defaults": ["default"],
    "name": "nodes",
    "seeds": 2,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 9,
    },
    "parts": {  # each node is given one of the first two trials, which need the spaces
        "guided": {"overrides": {"cpmm.initialization.kind": "gaussian", "cpmm.curriculum": True}},
        "alone": {"overrides": {"cpmm.initialization.kind": "kmeans"}},
    },
}

LOOK = """
import json, os, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote(num_cpus=0)
def look(paths):
    try:
        import cpmm
    except ImportError:
        importable = False
    else:
        importable = True
    return {
        "found": [path for path in paths if os.path.exists(path)],
        "importable": importable,
        "devices": {path: os.stat(path).st_dev for path in ("/dev/shm", "/tmp/ray")},
        "pids": os.readlink("/proc/self/ns/pid"),
    }

ray.init(address=sys.argv[1], log_to_driver=False)
for _ in range(120):
    nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
    if len(nodes) == 2:
        break
    time.sleep(0.5)
seen = {
    address: {"node": node}
    | ray.get(look.options(scheduling_strategy=On(node, soft=False)).remote(sys.argv[2:]))
    for address, node in nodes.items()
}
print(json.dumps(seen))
"""
BUCKET = """
import json, sys
import boto3

s3 = boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1")

def names(prefix):
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="cpmm", Prefix=prefix)
    return [o["Key"] for page in pages for o in page.get("Contents", [])]

def read(name):
    return s3.get_object(Bucket="cpmm", Key=name)["Body"].read()

match sys.argv[2:]:
    case ["make"]:
        s3.create_bucket(Bucket="cpmm")
    case ["records", prefix]:
        records = [n for n in names(prefix) if n.endswith("/record.json")]
        print(json.dumps([json.loads(read(n)) for n in records]))
    case ["flip", digest]:
        [name] = [n for n in names("dvc/") if n.endswith(f"/{digest[:2]}/{digest[2:]}")]
        content = bytearray(read(name))
        content[len(content) // 2] ^= 1
        s3.put_object(Bucket="cpmm", Key=name, Body=bytes(content))
"""


class Node:
    """A machine of its own: namespaces for network, mounts and processes, which end with the test.

    Args:
        name: Of its network namespace.
        hidden: Folders that are empty here, and kept in memory.
        home: Its home folder.
    """

    def __init__(self, name, hidden, home):
        self.home, self.started = home, []
        hidden = [Path(path).resolve() for path in hidden]
        kept = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        kept = sorted(p for p in kept if any(p.is_relative_to(folder) for folder in hidden))
        script = ["set -e"]
        script += [f"exec {10 + i}<{shlex.quote(str(p))}" for i, p in enumerate(kept)]
        for folder in map(shlex.quote, map(str, hidden)):
            script += [f"mkdir -p {folder}", f"mount -t tmpfs -o mode=1777 tmpfs {folder}"]
        for i, path in enumerate(map(shlex.quote, map(str, kept))):
            script += [f"mkdir -p {path}", f"mount -c --bind /proc/self/fd/{10 + i} {path}"]
            script += [f"exec {10 + i}<&-"]
        # Process 1 of the node, and with it the node, ends when the test closes the pipe, or dies.
        script += [f"mkdir -p {home}", "echo ready", "while read -r _; do :; done"]
        self.holder = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", "\n".join(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.holder.stdout.readline() != "ready\n":
            reason = self.holder.stderr.read().strip()
            self.end()
            pytest.skip(f"no mount or process namespaces here: {reason}")
        [child] = psutil.Process(self.holder.pid).children()
        self.pid = child.pid

    def _enter(self, arguments, cwd, environment):
        """Command and environment; nsenter passes the exit status on."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
        mine = {
            "HOME": str(self.home), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "env", "-C", str(cwd)]
        return [*enter, sys.executable, *arguments], kept | mine | environment

    def start(self, arguments, log, **environment):
        """Start this Python in the background."""
        command, environment = self._enter(arguments, "/", environment)
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)

    def run(self, arguments, cwd="/", **environment):
        """Run this Python, and wait for its end."""
        command, environment = self._enter(arguments, cwd, environment)
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    def path(self, path):
        """A path of the node, as it is seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    def processes(self, name):
        """Processes there that run the program of this name."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                same = os.readlink(folder / "ns" / "pid") == mine
                if same and Path(os.readlink(folder / "exe")).name == name:
                    found.append(psutil.Process(int(folder.name)))
            except (OSError, psutil.Error):
                continue  # it has ended
        return found

    def end(self):
        """Process 1 ends, and the kernel ends all others of the node."""
        self.holder.stdin.close()
        try:
            self.holder.wait(10)
        except subprocess.TimeoutExpired:
            self.holder.kill()
            self.holder.wait()
        for process in self.started:
            process.wait(10)
        for pipe in (self.holder.stdout, self.holder.stderr):
            pipe.close()


def network(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes with a wire between them, nothing else in common but the Python environment."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    missing = [name for name in ("ip", "nsenter", "unshare", "mount") if not shutil.which(name)]
    if missing:
        pytest.skip(f"namespaces need {', '.join(missing)}")
    base = tmp_path_factory.getbasetemp()
    names = [f"cpmm-{os.getpid()}-{i}" for i in (1, 2)]
    made, ends = [], []
    try:
        for name in names:
            if reason := network("netns", "add", name):
                pytest.skip(f"`ip netns` is not permitted here: {reason}")
            ends.append(name)
        wire = ["link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire"]
        if reason := network(*wire, "netns", names[1]):
            pytest.skip(f"no veth pairs here: {reason}")
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            for step in (
                ["addr", "add", f"{address}/24", "dev", "wire"],
                ["link", "set", "lo", "up"],
                ["link", "set", "wire", "up"],
            ):
                assert not network("-n", name, *step)
        shared = ["/dev/shm", "/tmp/ray"]
        made.append(Node(names[0], shared, base / "home"))
        private = [ROOT, "/tmp", tempfile.gettempdir(), base, Path.home() / ".cache", *shared]
        made.append(Node(names[1], dict.fromkeys(private), OTHER_HOME))
        yield made
    finally:
        for node in made:
            node.end()
        for name in ends:
            network("netns", "del", name)


def ray_start(*arguments):
    return (
        "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats",
        "--object-store-memory=200000000", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project whose inputs DVC has locked, and the sweep's table from a local Ray."""
    folder = copy_project(tmp_path_factory.mktemp("nodes") / "project", TINY)
    path = folder / "conf" / "sweep" / "nodes.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    for command in (
        ["-m", "dvc", "repro", "build_spaces"],
        [*SWEEP_COMMAND, f"ray.storage={folder.parent / 'local'}", "ray.dashboard=false"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=project_environment(folder),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert "making" not in done.stdout  # the inputs are those that DVC has locked
    return folder, table(folder)


@pytest.fixture(scope="module")
def cluster(nodes, project, tmp_path_factory):
    """Ray on both, as docs/cluster.md says; what each of them sees of the project."""
    head, other = nodes
    logs = tmp_path_factory.mktemp("logs")
    addresses = [
        ["--head", "--port=6379", f"--node-ip-address={HEAD}", "--include-dashboard=false"]
    ]
    addresses += [[f"--address={CLUSTER}", f"--node-ip-address={OTHER}"]]
    head.start(ray_start(*addresses[0]), logs / "head.log", **CREDENTIALS)
    until(lambda: head.processes("raylet"), logs / "head.log")
    other.start(ray_start(*addresses[1]), logs / "other.log")
    private = [*(ROOT / name for name in ("cpmm", "workflows", "data", "conf")), project[0]]
    private += [project[0] / "data" / "digits" / "prepared", head.home]
    done = head.run(["-c", LOOK, CLUSTER, *map(str, private)])
    assert done.returncode == 0, done.stdout + done.stderr + (logs / "other.log").read_text()
    return private, json.loads(done.stdout.splitlines()[-1])


def until(condition, log, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def sweep(node, folder, *options, address=CLUSTER, **environment):
    command = [*SWEEP_COMMAND, f"ray.address={address}", *options]
    return node.run(command, folder, **{"PYTHONPATH": str(folder), **environment})


def table(folder):
    """Everything that the sweep found; what it took is another matter."""
    trials = pd.read_csv(folder / "data" / "digits" / "sweep" / "nodes" / "trials.csv")
    return trials.drop(columns=["seconds", "seconds_10k", "memory_gb"])


def assert_same(got, expected):
    pd.testing.assert_frame_equal(got, expected, check_exact=True)


def trained_by(records):
    return {record["worker"]["node"] for record in records}


def test_the_nodes_share_nothing(cluster):
    private, seen = cluster
    assert set(seen) == {HEAD, OTHER}
    here, there = seen[HEAD], seen[OTHER]
    assert here["found"] == [str(path) for path in private]
    assert there["found"] == []
    assert not there["importable"]
    assert here["pids"] != there["pids"]
    assert all(here["devices"][path] != there["devices"][path] for path in here["devices"])


def test_inputs_travel_from_the_driver(nodes, cluster, project, tmp_path):
    folder, expected = project
    done = sweep(nodes[0], folder, "ray.inputs=driver", f"ray.storage={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"attached to {CLUSTER} | 2 nodes, 2 CPUs" in done.stdout
    records = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/record.json")]
    assert len(records) == len(expected) == 4
    assert trained_by(records) == {seen["node"] for seen in cluster[1].values()}
    assert_same(table(folder), expected)
    assert not nodes[1].path(OTHER_HOME).joinpath(".cache", "cpmm").exists()


@pytest.fixture(scope="module")
def bucket(nodes, project, tmp_path_factory):
    """An S3 server on the first node, the DVC remote and the archive in its bucket."""
    for name in ("boto3", "dvc_s3", "flask", "flask_cors", "moto"):
        pytest.importorskip(name, reason="pip install -c constraints.txt -e '.[servers]'")
    log = tmp_path_factory.mktemp("server") / "server.log"
    head, folder = nodes[0], project[0]
    host, port = SERVER.split(":")
    head.start(["-m", "moto.server", "-H", host, "-p", port], log)
    until(lambda: "Running on" in log.read_text(), log)

    def call(*arguments):
        done = head.run(["-c", BUCKET, f"http://{SERVER}", *arguments], **CREDENTIALS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else None

    call("make")
    for arguments in (
        ["add", "--local", "-d", "server", "s3://cpmm/dvc"],
        ["modify", "--local", "server", "endpointurl", f"http://{SERVER}"],
        ["modify", "--local", "server", "access_key_id", CREDENTIALS["AWS_ACCESS_KEY_ID"]],
        ["modify", "--local", "server", "secret_access_key", SECRET],
    ):
        subprocess.run(
            [sys.executable, "-m", "dvc", "remote", *arguments],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return call, log


def files_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_node_pulls_the_inputs_by_hash(nodes, cluster, project, bucket):
    folder, expected = project
    call, log = bucket
    storage = f"ray.storage='s3://cpmm/whole?scheme=http&endpoint_override={SERVER}'"
    done = sweep(nodes[0], folder, "ray.inputs=remote", storage, **CREDENTIALS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    records = call("records", "whole/")
    assert len(records) == len(expected)
    assert trained_by(records) == {seen["node"] for seen in cluster[1].values()}
    assert_same(table(folder), expected)
    assert not (nodes[0].home / ".cache" / "cpmm").exists()  # the driver's node has the originals

    home = Path("data") / "digits"
    pulled = sorted(nodes[1].path(OTHER_HOME).glob(".cache/cpmm/*"))
    assert any((root / home / "spaces").exists() for root in pulled)
    for root in pulled:
        assert (root / "complete").is_file()
        assert not (root / ".dvc" / "config.local").exists()
        for name in ("prepared", "spaces"):
            if name == "prepared" or (root / home / name).exists():
                assert files_in(root / home / name) == files_in(folder / home / name)
    asked = [line for line in log.read_text().splitlines() if line.startswith(OTHER)]
    assert any("GET /cpmm/dvc/files/md5/" in line for line in asked)
    assert not any("/cpmm/whole/" in line for line in asked)  # the archive is the first node's


def test_a_damaged_object_makes_no_number_and_once_mended_the_sweep_goes_on(
    nodes, cluster, project, bucket, tmp_path
):
    folder, expected = project
    call, _ = bucket
    prepared = folder / "data" / "digits" / "prepared" / "prepared.safetensors"
    digest = hashlib.md5(prepared.read_bytes()).hexdigest()
    options = ["ray.inputs=remote", f"ray.storage={tmp_path}", "ray.max_failures=0"]
    call("flip", digest)
    shutil.rmtree(nodes[1].path(OTHER_HOME) / ".cache")
    done = sweep(nodes[0], folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    got = table(folder)
    finished, lost = got["status"] == "finished", got["status"] == "lost"
    assert lost.any()
    assert (finished | lost).all()
    scores = ["validation", "density", "accuracy", "nmi", "ari", "purity"]
    assert got.loc[lost, scores].isna().all(axis=None)
    assert_same(got.loc[finished, scores], expected.loc[finished, scores])
    for reason in got.loc[lost, "reason"]:
        assert f"node {OTHER} cannot get the inputs: on the DVC remote" in reason

    call("flip", digest)
    done = sweep(nodes[0], folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming, {len(expected)} trials, {finished.sum()} done before" in done.stdout
    assert_same(table(folder), expected)


@pytest.mark.parametrize(
    ("address", "environment", "message"),
    [
        (CLUSTER, {"RAY_AUTH_TOKEN": TOKEN[::-1]}, "Authentication token is missing or incorrect"),
        (f"{HEAD}:6380", {}, "Connection refused"),
    ],
    ids=["token", "address"],
)
def test_a_cluster_that_refuses_makes_one_clear_line(
    address, environment, message, nodes, cluster, project, tmp_path
):
    options = [f"ray.storage={tmp_path}", "ray.connect_seconds=10"]
    assert_refused(sweep(nodes[0], project[0], *options, address=address, **environment), message)


def test_a_head_that_hangs_is_given_up_in_time(nodes, cluster, project, tmp_path):
    [server] = nodes[0].processes("gcs_server")
    began = time.monotonic()
    server.suspend()
    try:
        done = sweep(nodes[0], project[0], f"ray.storage={tmp_path}", "ray.connect_seconds=5")
    finally:
        server.resume()
    assert_refused(done, "ray.connect_seconds")
    assert time.monotonic() - began < 45  # most of it are imports, beside the 5 s


def assert_refused(done, message):
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"sweep: error: cannot attach to a Ray cluster at {HEAD}:")
    assert message in done.stderr
