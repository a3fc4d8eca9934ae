"""Pipeline and sweep without a network: they run through, and nothing of ours tries to leave."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import yaml
from conftest import TINY, copy_project, project_environment

pytestmark = pytest.mark.slow

LISTENING = "0A"  # in /proc/net/tcp
# 127.0.0.1, the same as an address of IPv6, and ::1
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}
DASHBOARD = 8265
# Whether this is Azure, Google's cloud or AWS: Ray 2.60's dashboard process asks at its start, with usage
# statistics off, too (UsageStatsHead.run), and has no switch for it.
ASKED_BY_RAY = re.compile(
    r"169\.254\.169\.254 80 |10\.88\.0\.1 53 .*\.metadata\.google\.internal\."
)
SWEEP = {
    "defaults": ["default"],
    "name": "offline",
    "seeds": 1,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 9,
    },
    "parts": {"alone": {"grid": {"cpmm.initialization.kind": ["random", "kmeans"]}}},
}
# All routes lead into a wire whose other end nobody reads; who serves names is behind it.
WIRE = """
sysctl -qw net.ipv6.conf.all.disable_ipv6=1
ip link add out type veth peer name nobody
ip addr add 10.77.0.1/24 dev out
ip link set out up
ip link set nobody up
ip neigh add 10.77.0.2 lladdr 02:00:00:00:00:02 dev out
ip route add default via 10.77.0.2
"""
NAMES = "nameserver 10.88.0.1\noptions timeout:1 attempts:1\n"
LISTEN = """
import socket
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # every kind of packet
wire.bind(("nobody", 0))
print("ready", flush=True)
while packet := wire.recv(65536):
    text = "".join(chr(c) if 32 < c < 127 else "." for c in packet[42:])
    print(socket.inet_ntoa(packet[30:34]), int.from_bytes(packet[36:38], "big"), text, flush=True)
"""
ASK = "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError as error: print(error)"
SEND = "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.9', 9))"


class Island:
    """A network namespace with the loopback interface, and maybe a wire on which packets are counted."""

    def __init__(self, folder, wire):
        self.listener = None
        names = folder / "resolv.conf"
        names.write_text(NAMES)
        script = f"set -e\nip link set lo up\n{WIRE if wire else ''}\n"
        script += f"mount --bind {names} /etc/resolv.conf\necho ready\nread -r _"
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.holder.stdout.readline() != "ready\n":
            reason = self.holder.stderr.read().strip()
            self.end()
            pytest.skip(f"no network of its own here: {reason}")
        self.log = folder / "packets.log"
        if wire:
            with self.log.open("w") as log:
                self.listener = subprocess.Popen(
                    [*self.enter(), sys.executable, "-c", LISTEN], stdout=log, stderr=subprocess.STDOUT
                )  # fmt: skip
            deadline = time.monotonic() + 30
            while not self.log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def enter(self):
        return ["nsenter", "-t", str(self.holder.pid), "-n", "-m"]

    def run(self, *arguments, folder):
        enter = [*self.enter(), "env", "-C", str(folder)]
        environment = {k: v for k, v in project_environment(folder).items() if k[:4] != "RAY_"}
        return subprocess.run(
            [*enter, sys.executable, *arguments], env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip

    def sent(self):
        """What was sent out: address, port and text of each packet."""
        time.sleep(0.2)  # until the listener has written
        return self.log.read_text().splitlines()[1:] if self.listener else []

    def interfaces(self):
        with open(f"/proc/{self.holder.pid}/net/dev") as lines:
            return [line.split(":")[0].strip() for line in lines if ":" in line]

    def listening(self):
        """Local addresses and ports of all sockets that take connections."""
        found = set()
        for family in ("tcp", "tcp6"):
            with open(f"/proc/{self.holder.pid}/net/{family}") as lines:
                rows = [line.split() for line in lines][1:]
            found |= {tuple(row[1].split(":")) for row in rows if row[3] == LISTENING}
        return {(address, int(port, 16)) for address, port in found}

    @contextmanager
    def watched(self):
        """Yield a set that gathers what listens until the end."""
        found, over = set(), threading.Event()

        def look():
            while not over.wait(0.05):
                found.update(self.listening())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()

    def end(self):
        if self.listener:
            self.listener.kill()
            self.listener.wait()
        self.holder.stdin.close()
        self.holder.wait()
        for pipe in (self.holder.stdout, self.holder.stderr):
            pipe.close()


@pytest.fixture(params=["loopback alone", "a wire where packets are counted"])
def island(request, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("a network of its own needs root")
    missing = [name for name in ("ip", "nsenter", "unshare", "mount") if not shutil.which(name)]
    if missing:
        pytest.skip(f"a network of its own needs {', '.join(missing)}")
    made = Island(tmp_path, wire=request.param != "loopback alone")
    try:
        yield made
    finally:
        made.end()


def test_nothing_needs_or_seeks_a_network(island, tmp_path):
    folder = copy_project(tmp_path / "project", TINY)
    (folder / "conf" / "sweep" / "offline.yaml").write_text(yaml.safe_dump(SWEEP))
    params = yaml.safe_load((folder / "params.yaml").read_text()) | {"sweeps": ["offline"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    counted = "out" in island.interfaces()
    if counted:  # what asks for a name, or sends anywhere, is noticed
        for attempt in (ASK, SEND):
            before = len(island.sent())
            done = island.run("-c", attempt, folder=folder)
            assert done.returncode == 0, done.stderr
            assert len(island.sent()) > before
    else:
        assert island.interfaces() == ["lo"]
    before = island.sent()
    with island.watched() as listening:
        done = island.run("-m", "dvc", "repro", folder=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "data" / "digits" / "report.html").is_file()
    assert (folder / "data" / "digits" / "sweep" / "offline" / "table.md").is_file()
    sent = island.sent()[len(before) :]
    print(f"sent by Ray: {[line for line in sent if ASKED_BY_RAY.match(line)]}")
    assert [line for line in sent if not ASKED_BY_RAY.match(line)] == []
    print(f"{len(listening)} ports listened, on {sorted({address for address, _ in listening})}")
    assert DASHBOARD in {port for _, port in listening}
    assert {address for address, _ in listening} <= LOOPBACK
