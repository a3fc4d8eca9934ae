"""DVC remotes of a user's own: a folder, Debian's sshd and an S3 server, all real, on loopback.

The commands are those of docs/remotes.md, read from there.
"""

import getpass
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, copy_project, project_environment

pytestmark = pytest.mark.slow

UP_TO_DATE = "Data and pipelines are up to date."
INSTALL = "run `make servers` once"
OUTPUTS = ("data", "extra")
PULL = ("pull", "-d", "report", "extra.dvc")
# A piece of an object under a name that no object has.
PIECE = re.compile(r"[0-9a-f]{2}/\.[\w-]+\.tmp")
MIXTURE = "data/digits/mixture/mixture.safetensors"


def digest(content):
    return hashlib.md5(content).hexdigest()


def key_of(name):
    """Where an object lies in a remote or a cache, by its hash."""
    return f"{name[:2]}/{name[2:]}"


def damaged(contents):
    """Objects that are not what their name, the md5 of their content, says."""
    return {key for key, content in contents.items() if key_of(digest(content)) != key[:33]}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(condition, log, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def start(command, log, sign, **environment):
    """Start a server, and wait until it says that it listens."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        until(lambda: sign in log.read_text(), log)
    except BaseException:
        process.kill()
        raise
    return process


class Relay:
    """A line to a server that goes dead once so many bytes have passed in one direction."""

    def __init__(self, target):
        self.target, self.lock = target, threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.mend()
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self, **limits):
        """Pass everything from now on, or as many bytes ``up`` or ``down`` as are given."""
        with self.lock:
            self.limits, self.dead = limits, threading.Event()
            self.passed = {"up": 0, "down": 0}

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            for end in (client, server):  # or each small packet waits 40 ms for an answer
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._pass, args=("down", server, client), daemon=True)
            back.start()
            self._pass("up", client, server)
            back.join()

    def _pass(self, way, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 14):
                with self.lock:
                    self.passed[way] += len(data)
                    if self.passed[way] > self.limits.get(way, float("inf")):
                        self.dead.set()
                    dead = self.dead.is_set()
                if not dead:
                    sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.server.close()


def files_of(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


def stamps_of(folder):
    """What changes when a file is written again."""
    stats = {key: path.stat() for key, path in files_of(folder).items()}
    return {key: (s.st_ino, s.st_mtime_ns, s.st_size) for key, s in stats.items()}


class Folder:
    """Remotes that are folders of this machine."""

    heading = "A folder"

    def __init__(self, base):
        self.base = base / "served"

    def placeholders(self, place):
        return {"FOLDER": self.base / place}

    def objects(self, place):
        return self.base / place / "files" / "md5"

    def stamps(self, place):
        return stamps_of(self.objects(place))

    def read(self, place):
        return {key: path.read_bytes() for key, path in files_of(self.objects(place)).items()}

    def write(self, place, key, content):
        path = self.objects(place) / key
        path.chmod(0o644)
        path.write_bytes(content)

    def remove(self, place, key):
        (self.objects(place) / key).unlink()

    def end(self):
        pass


class Ssh(Folder):
    """Debian's sshd, with keys and a configuration of its own."""

    heading = "ssh"

    def __init__(self, base):
        super().__init__(base)
        programs = {
            name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
            for name in ("sshd", "ssh-keygen")
        }
        for name, path in programs.items():
            if not path:
                pytest.skip(f"no {name} on this machine: {INSTALL}")
        pytest.importorskip("dvc_ssh", reason=INSTALL)
        self.keys, self.log, self.port = base / "keys", base / "sshd.log", free_port()
        self.keys.mkdir(mode=0o700)
        self.base.mkdir()
        for name in ("host", "user", "stranger"):
            subprocess.run(
                [programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-f", self.keys / name],
                check=True,
            )
        config = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": self.keys / "host",
            "AuthorizedKeysFile": self.keys / "user.pub",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitUserRC": "no",
            "Subsystem": "sftp internal-sftp",
        }
        path = self.keys / "sshd_config"
        path.write_text("".join(f"{key} {value}\n" for key, value in config.items()))
        if os.geteuid() == 0:  # then sshd wants this empty folder, which Debian's service makes
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [programs["sshd"], "-D", "-e", "-f", path]
        self.process = start(command, self.log, "Server listening")
        self.relay = Relay(self.port)

    def placeholders(self, place):
        return {
            "USER": getpass.getuser(),
            "HOST": f"127.0.0.1:{self.relay.port}",
            "/PATH": self.base / place,
            "KEYFILE": self.keys / "user",
        }

    def stranger(self):
        return {"KEYFILE": self.keys / "stranger"}

    def elsewhere(self, port):
        return {"HOST": f"127.0.0.1:{port}"}

    def settle(self):
        """Wait until it has noticed that nobody is left."""
        until(lambda: not psutil.Process(self.process.pid).children(), self.log)

    def end(self):
        self.relay.close()
        self.process.terminate()
        self.process.wait()


class S3:
    """Moto's server, which here checks signatures, and a look into its bucket without DVC."""

    heading = "S3"

    def __init__(self, base):
        for name in ("boto3", "dvc_s3", "flask", "flask_cors", "moto"):
            pytest.importorskip(name, reason=INSTALL)
        self.log, self.port = base / "server.log", free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        # The four calls below need no credentials; each one after them does.
        self.process = start(command, self.log, "Running on", INITIAL_NO_AUTH_ACTION_COUNT="4")
        anything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        users = self._client("iam", "none", "none")
        users.create_user(UserName="user")
        users.put_user_policy(
            UserName="user", PolicyName="all",
            PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [anything]}),
        )  # fmt: skip
        made = users.create_access_key(UserName="user")["AccessKey"]
        self.access, self.secret = made["AccessKeyId"], made["SecretAccessKey"]
        self._client("s3", "none", "none").create_bucket(Bucket="cpmm")
        self.client = self._client("s3", self.access, self.secret)
        self.relay = Relay(self.port)

    def _client(self, service, access, secret):
        import boto3

        return boto3.client(
            service, endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1",
            aws_access_key_id=access, aws_secret_access_key=secret,
        )  # fmt: skip

    def placeholders(self, place):
        return {
            "BUCKET": "cpmm",
            "PATH": place,
            "URL": f"http://127.0.0.1:{self.relay.port}",
            "ACCESS_KEY": self.access,
            "SECRET_KEY": self.secret,
        }

    def stranger(self):
        return {"SECRET_KEY": self.secret[::-1]}

    def elsewhere(self, port):
        return {"URL": f"http://127.0.0.1:{port}"}

    def _list(self, place):
        prefix = f"{place}/files/md5/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="cpmm", Prefix=prefix)
        return {
            item["Key"].removeprefix(prefix): item
            for page in pages
            for item in page.get("Contents", [])
        }

    def stamps(self, place):
        return {
            key: (item["ETag"], item["LastModified"], item["Size"])
            for key, item in self._list(place).items()
        }

    def read(self, place):
        return {
            key: self.client.get_object(Bucket="cpmm", Key=item["Key"])["Body"].read()
            for key, item in self._list(place).items()
        }

    def write(self, place, key, content):
        self.client.put_object(Bucket="cpmm", Key=f"{place}/files/md5/{key}", Body=content)

    def remove(self, place, key):
        self.client.delete_object(Bucket="cpmm", Key=f"{place}/files/md5/{key}")

    def settle(self):
        """Wait until it has noticed that nobody is left."""
        self.client.close()
        server = psutil.Process(self.process.pid)
        until(
            lambda: psutil.CONN_ESTABLISHED not in {c.status for c in server.net_connections()},
            self.log,
        )

    def end(self):
        self.client.close()
        self.relay.close()
        self.process.terminate()
        self.process.wait()


SERVERS = {"folder": Folder, "ssh": Ssh, "S3": S3}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start a server when a test first asks for it."""
    started = {}

    def get(kind):
        if kind not in started:
            started[kind] = SERVERS[kind](tmp_path_factory.mktemp(kind))
        return started[kind]

    yield get
    for server in started.values():
        server.end()


@pytest.fixture(params=SERVERS)
def server(request, serve):
    return serve(request.param)


@pytest.fixture(params=["ssh", "S3"])
def distant(request, serve):
    return serve(request.param)


class Checkout:
    """A checkout of the project, and DVC in it, which sees no configuration but the project's."""

    def __init__(self, folder, home):
        self.folder = folder
        kept = {
            key: value
            for key, value in project_environment(folder).items()
            if not key.startswith(("AWS_", "DVC_", "SSH_"))
        }
        names = ("DVC_GLOBAL_CONFIG_DIR", "DVC_SITE_CACHE_DIR", "DVC_SYSTEM_CONFIG_DIR")
        self.environment = kept | {"HOME": str(home)} | {n: str(home / n.lower()) for n in names}

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments], cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def dvc(self, *arguments):
        process = self.start(*arguments)
        try:
            printed, _ = process.communicate(timeout=300)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, printed

    def do(self, *arguments):
        status, printed = self.dvc(*arguments)
        assert status == 0, printed
        return printed

    def git(self, *arguments):
        return subprocess.run(
            ["git", "-c", "user.name=Test", "-c", "user.email=test@localhost", *arguments],
            cwd=self.folder, env=self.environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    def use(self, server, place, **changes):
        """Set the remote up with the commands of the documentation, its placeholders filled in."""
        text = (ROOT / "docs" / "remotes.md").read_text()
        [block] = re.findall(rf"^## {server.heading}\n.*?^```\n(.*?)^```", text, re.S | re.M)
        for word, value in (server.placeholders(place) | changes).items():
            assert word in block
            block = re.sub(rf"(?<![A-Z_]){word}(?![A-Z_])", str(value), block)
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dvc"
            self.do(*arguments)

    def use_that_of(self, other):
        shutil.copy(other.folder / ".dvc" / "config.local", self.folder / ".dvc")

    def modify(self, *arguments):
        self.do("remote", "modify", "--local", "mine", *arguments)

    def outputs(self):
        """The md5 of each file that DVC keeps."""
        return {
            f"{name}/{key}": digest(path.read_bytes())
            for name in OUTPUTS
            for key, path in files_of(self.folder / name).items()
            if "/.scratch/" not in f"/{key}"
        }

    @property
    def cache(self):
        return self.folder / ".dvc" / "cache" / "files" / "md5"

    def lock(self):
        return (self.folder / "dvc.lock").read_bytes()

    def kill(self, server, arguments, **limits):
        """Start DVC on a line that goes dead on the way, and kill it and all its children there."""
        server.relay.mend(**limits)
        process = self.start(*arguments)
        try:
            assert server.relay.dead.wait(120), "it ended, or never began"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        server.settle()
        server.relay.mend()


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The tiny project with its results, and a folder of many files beside them."""
    base = tmp_path_factory.mktemp("origin")
    made = Checkout(copy_project(base / "project", TINY), base)
    made.do("repro", "report")
    generator = random.Random(0)
    (made.folder / "extra").mkdir()
    for i in range(200):
        (made.folder / "extra" / f"{i}.bin").write_bytes(generator.randbytes(1 << 16))
    made.do("add", "extra")
    made.git("add", "-A")
    made.git("commit", "-qm", "Results")
    outputs = made.outputs()
    tracked = made.git(
        "ls-files", *OUTPUTS
    ).splitlines()  # DVC may cache them, but keeps them to itself
    listed = made.lock().decode() + (made.folder / "extra.dvc").read_text()
    names = {digest for path, digest in outputs.items() if path not in tracked}
    names |= set(re.findall(r"md5: (\w{32}\.dir)$", listed, re.M))
    sizes = {
        key: path.stat().st_size
        for key, path in files_of(made.cache).items()
        if key in set(map(key_of, names))
    }
    return made, outputs, sizes


@pytest.fixture
def mine(origin, tmp_path):
    """A copy of it to push from."""
    shutil.copytree(origin[0].folder, tmp_path / "mine", symlinks=True)
    return Checkout(tmp_path / "mine", tmp_path)


@pytest.fixture
def clone(origin, tmp_path):
    """Clone it, without data, to pull into."""

    def make(name="clone"):
        subprocess.run(["git", "clone", "-q", origin[0].folder, tmp_path / name], check=True)
        return Checkout(tmp_path / name, tmp_path)

    return make


def test_a_clone_pulls_what_was_pushed_and_has_nothing_to_run(server, origin, mine, clone):
    _, outputs, sizes = origin
    config = (mine.folder / ".dvc" / "config").read_bytes()
    mine.use(server, "whole")
    assert (mine.folder / ".dvc" / "config").read_bytes() == config
    assert mine.git("status", "--porcelain") == ""
    local = (mine.folder / ".dvc" / "config.local").read_text()
    assert all(str(value) in local for value in server.placeholders("whole").values())
    assert f"{len(sizes)} files pushed" in mine.do("push")
    pushed = server.read("whole")
    assert pushed.keys() == sizes.keys()
    assert not damaged(pushed)
    lock = mine.lock()
    shutil.rmtree(mine.folder)

    other = clone()
    assert other.outputs().items() < outputs.items()  # what git keeps: config.yaml, metrics.json
    other.use(server, "whole")
    other.do(*PULL)
    assert other.outputs() == outputs
    printed = other.do("repro", "report")
    assert UP_TO_DATE in printed
    assert "Running stage" not in printed
    assert other.lock() == lock
    assert other.outputs() == outputs
    assert other.git("status", "--porcelain") == ""


def test_a_killed_push_goes_on_where_it_was(distant, origin, mine, clone):
    _, outputs, sizes = origin
    mine.use(distant, "push")
    mine.kill(distant, ["push"], up=sum(sizes.values()) // 2)
    stamps = distant.stamps("push")
    whole = {key: stamp for key, stamp in stamps.items() if key in sizes}
    assert 0 < len(whole) < len(sizes)
    contents = distant.read("push")
    assert not damaged({key: contents[key] for key in whole})
    pieces = stamps.keys() - whole.keys()
    assert all(PIECE.fullmatch(key) for key in pieces)

    left = sizes.keys() - whole.keys()
    assert f"{len(left)} files pushed" in mine.do("push")
    again = distant.stamps("push")
    assert {key: again[key] for key in whole} == whole
    assert again.keys() == sizes.keys() | pieces
    contents = distant.read("push")
    assert not damaged({key: contents[key] for key in sizes})
    # What went over the line: the rest, with what the protocols add.
    assert distant.relay.passed["up"] < 1.05 * sum(sizes[key] for key in left) + 500_000

    other = clone()
    other.use_that_of(mine)
    other.do(*PULL)
    assert other.outputs() == outputs


def test_a_killed_pull_goes_on_where_it_was(distant, origin, mine, clone):
    _, outputs, sizes = origin
    mine.use(distant, "pull")
    mine.do("push")
    other = clone()
    other.use_that_of(mine)
    other.kill(distant, PULL, down=sum(sizes.values()) // 2)
    stamps = stamps_of(other.cache)
    whole = {key: stamp for key, stamp in stamps.items() if key in sizes}
    assert 0 < len(whole) < len(sizes)
    assert not damaged({key: (other.cache / key).read_bytes() for key in whole})
    pieces = stamps.keys() - whole.keys()
    assert all(PIECE.fullmatch(key) for key in pieces)

    left = sizes.keys() - whole.keys()
    assert f"{len(left)} files fetched" in other.do(*PULL)
    again = stamps_of(other.cache)
    assert {key: again[key][:2] for key in whole} == {key: whole[key][:2] for key in whole}
    assert again.keys() == sizes.keys() | pieces
    assert not damaged({key: (other.cache / key).read_bytes() for key in sizes})
    assert distant.relay.passed["down"] < 1.05 * sum(sizes[key] for key in left) + 500_000
    assert other.outputs() == outputs
    assert UP_TO_DATE in other.do("repro", "report")


def test_a_damaged_object_is_refused_with_verify_alone(server, origin, mine, clone):
    _, outputs, _ = origin
    mine.use(server, "damaged")
    mine.do("push")
    key = key_of(outputs[MIXTURE])
    content = bytearray(server.read("damaged")[key])
    content[len(content) // 2] ^= 1
    server.write("damaged", key, bytes(content))
    assert damaged(server.read("damaged")) == {key}

    # As the documentation sets it up, with verify.
    careful = clone("careful")
    careful.use_that_of(mine)
    status, printed = careful.dvc(*PULL, "-v")
    assert status != 0
    assert "Checkout failed for following targets:\ndata/digits/mixture\n" in printed
    assert f"corrupted cache file '{careful.cache / key}'" in printed
    assert not (careful.folder / MIXTURE).exists()
    assert not (careful.cache / key).exists()

    # Without it, nobody notices.
    careless = clone("careless")
    careless.use_that_of(mine)
    careless.modify("verify", "false")
    careless.do(*PULL)
    assert (careless.folder / MIXTURE).read_bytes() == content
    assert UP_TO_DATE in careless.do("repro", "report")

    # To mend it, both the object and the listing that names it must go.
    assert "Everything is up to date." in mine.do("push")
    server.remove("damaged", key)
    assert "Everything is up to date." in mine.do("push")
    lock = mine.lock().decode()
    listing = re.search(r"path: data/digits/mixture\n\s+hash: md5\n\s+md5: (\w+\.dir)", lock)[1]
    server.remove("damaged", key_of(listing))
    assert "2 files pushed" in mine.do("push")
    assert not damaged(server.read("damaged"))
    careful.do(*PULL)
    assert careful.outputs() == outputs


REFUSALS = {
    ("ssh", "stranger"): "Permission denied for user",
    ("ssh", "closed"): "Connect call failed",
    ("ssh", "silent"): "ERROR: ",  # it says no more
    ("S3", "stranger"): "Forbidden",
    ("S3", "closed"): "Could not connect to the endpoint URL",
    ("S3", "silent"): "imeout on endpoint URL",
}
TIMEOUTS = {"ssh": ["timeout"], "S3": ["connect_timeout", "read_timeout"]}


@pytest.mark.parametrize(("kind", "fault"), REFUSALS)
def test_a_server_that_refuses_or_is_down_ends_the_command_soon(kind, fault, serve, mine, clone):
    distant, other = serve(kind), clone()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        if fault == "stranger":
            changes = distant.stranger()
        else:
            port = free_port() if fault == "closed" else silent.getsockname()[1]
            changes = distant.elsewhere(port)
        mine.use(distant, fault, **changes)
        for option in TIMEOUTS[kind]:
            mine.modify(option, "1")
        other.use_that_of(mine)
        commands = [(mine, ["push"]), (other, PULL)]
        if (kind, fault) == ("S3", "silent"):
            commands.pop()  # it ends as well, but tries 110 times before: docs/remotes.md
        for checkout, command in commands:
            checkout.environment["AWS_MAX_ATTEMPTS"] = "1"
            began = time.monotonic()
            status, printed = checkout.dvc(*command)
            seconds = time.monotonic() - began
            print(f"{kind}, {fault}, {command[0]}: {seconds:.1f} s\n{printed}")
            assert status != 0
            assert REFUSALS[kind, fault] in printed
            assert (
                seconds < 90
            )  # 25 s, the first pull over ssh, on a machine that does nothing else
    assert not other.cache.exists() or not files_of(other.cache)


def test_dvc_takes_any_host_key_and_a_tunnel_of_openssh_does_not(serve, mine, tmp_path):
    server, program = serve("ssh"), shutil.which("ssh")
    if not program:
        pytest.skip(f"no ssh on this machine: {INSTALL}")
    key = {name: (server.keys / f"{name}.pub").read_text() for name in ("host", "stranger")}
    home = Path(mine.environment["HOME"]) / ".ssh"
    home.mkdir()
    known, config, inside = home / "known_hosts", home / "config", free_port()
    config.write_text(
        f"Host *\n  UserKnownHostsFile {known}\n  GlobalKnownHostsFile none\n"
        f"  StrictHostKeyChecking yes\n  IdentityFile {server.keys / 'user'}\n"
        f"  IdentitiesOnly yes\n  ExitOnForwardFailure yes\n"
    )
    tunnel = [
        program, "-v", "-F", config, "-N", "-L", f"{inside}:127.0.0.1:{server.port}",
        "-p", str(server.relay.port), f"{getpass.getuser()}@127.0.0.1",
    ]  # fmt: skip

    known.write_text(f"[127.0.0.1]:{server.relay.port} {key['stranger']}")
    refused = subprocess.run(tunnel, capture_output=True, text=True, check=False, timeout=60)
    assert "Host key verification failed" in refused.stderr
    mine.use(server, "unchecked")
    mine.do("push")  # DVC with the same files in ~/.ssh

    known.write_text(f"[127.0.0.1]:{server.relay.port} {key['host']}")
    process = start(tunnel, tmp_path / "tunnel.log", "Entering interactive session")
    try:
        mine.do("remote", "remove", "--local", "mine")
        mine.use(server, "tunnel", HOST=f"127.0.0.1:{inside}")
        mine.do("push")
    finally:
        process.terminate()
        process.wait()
    assert not damaged(server.read("tunnel"))
    assert server.read("tunnel").keys() == server.read("unchecked").keys()
