"""Groups of three replicas on this machine's loopback, as real processes: lockd and etcd."""
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from systems import wait_until

REPLICAS = 3


class LockTools:
    """Binaries of both systems and of the load, built or fetched; says in one line what is missing."""

    def __init__(self, target, parts, etcd):
        self.csnap = os.environ.get("CSNAP_BIN", str(target / "release" / "csnap"))
        if not Path(self.csnap).exists():
            raise SystemExit("no csnap binary: run cargo build --release first")
        if not shutil.which("fio") and {"elections", "guest"} & set(parts):
            raise SystemExit("no fio, which elections and guest need: apt-get install fio, or name other --parts")
        if etcd and not shutil.which("protoc"):
            raise SystemExit("no protoc, which etcd's client is built with: apt-get install protobuf-compiler "
                             "libprotobuf-dev, or use --no-etcd")
        self.etcd = find_etcd(target / "etcd") if etcd else None
        self.load = os.environ.get("CSNAP_LOAD") or self.build_load(target, etcd)
        if etcd and "nodes" in parts:
            self.csnap_on_etcd = os.environ.get("CSNAP_BIN_ETCD") or self.build_csnap(target)

    @staticmethod
    def build_load(target, etcd):
        build("csnap-load", *(["--features", "etcd"] if etcd else []))
        return str(target / "release" / "csnap-load")

    @staticmethod
    def build_csnap(target):
        """A csnap with etcd, beside the one without, which is put back in its place."""
        made = target / "etcd" / "csnap"
        build("csnap-cli", "--features", "etcd")
        shutil.copy2(target / "release" / "csnap", made)
        build("csnap-cli")
        return str(made)


def build(package, *arguments):
    command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", package, *arguments]
    if subprocess.run(command, cwd=Path(__file__).parents[2]).returncode:
        raise SystemExit(f"{package} does not build; see above")


def find_etcd(cache):
    """An installed etcd, or Debian's, unpacked into a cache directory: installing it would start its service."""
    installed = shutil.which("etcd")
    if installed:
        return installed
    binary = cache / "usr" / "bin" / "etcd"
    if not binary.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(["apt-get", "download", "etcd-server"], cwd=cache, capture_output=True, text=True)
        packages = sorted(cache.glob("etcd-server_*.deb"))
        if fetched.returncode or not packages:
            raise SystemExit("no etcd, and apt-get download etcd-server does not fetch it: run apt-get update first, put "
                             "etcd on the PATH, or use --no-etcd")
        subprocess.run(["dpkg", "-x", packages[-1], cache], check=True)
    return str(binary)


def free_addresses(count):
    """Addresses that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = ["127.0.0.1:%d" % each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return addresses


class Running:
    """Groups that run while something is measured."""

    def __init__(self, *groups):
        self.groups = groups

    def __enter__(self):
        try:
            for group in self.groups:
                group.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        for group in self.groups:
            group.stop()


class Group:
    """Three replicas, each a process with a directory and a log of its own."""
    system = None
    server_lock = None  # what an agent's server holds

    def agent_lines(self):
        """Of the configuration file of an agent that uses this group; its last ones."""
        raise NotImplementedError

    def quoted(self):
        return ", ".join(f'"{address}"' for address in self.addresses)

    def __init__(self, tools, work, name):
        self.tools, self.work, self.name = tools, work, name
        self.addresses, self.peers = free_addresses(REPLICAS), free_addresses(REPLICAS)
        self.processes = [None] * REPLICAS
        for n in range(REPLICAS):
            self.dir(n).mkdir(parents=True)

    def dir(self, n):
        return self.work / f"{n + 1}"

    def log(self, n):
        path = self.dir(n) / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def command(self, n):
        raise NotImplementedError

    def leader(self):
        """The replica that leads; None while nobody is known to."""
        raise NotImplementedError

    def start(self):
        for n in range(REPLICAS):
            self.start_one(n)
        self.wait_for_leader()

    def wait_for_leader(self):
        wait_until(f"{self.name} has a leader", lambda: self.leader() is not None, 60)
        return self.leader()

    def start_one(self, n):
        with open(self.dir(n) / "log", "ab") as log:
            self.processes[n] = subprocess.Popen(self.command(n), stdout=log, stderr=log)

    def alive(self, n):
        return self.processes[n] is not None and self.processes[n].poll() is None

    def kill(self, n):
        self.processes[n].kill()
        self.processes[n].wait()

    def pids(self):
        return [process.pid for process in self.processes]

    def cpu_seconds(self):
        """Processor time that all replicas have taken."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        for n in range(REPLICAS):
            if self.alive(n):
                self.processes[n].send_signal(signal.SIGCONT)
                self.kill(n)


class LockdGroup(Group):
    """`csnap lockd`, three times."""
    system = "lockd"
    server_lock = "csnap/server"

    def __init__(self, tools, work, name, fast=False):
        super().__init__(tools, work, name)
        self.fast = fast
        for n in range(REPLICAS):
            quoted = ", ".join(f'"{peer}"' for peer in self.peers)
            (self.dir(n) / "lockd.toml").write_text(
                f'node = "n{n + 1}"\ndir = "{self.dir(n)}/data"\nlisten = ["{self.addresses[n]}"]\n'
                f'peer_listen = "{self.peers[n]}"\npeers = [{quoted}]\nfast_elections = {str(fast).lower()}\n')

    def command(self, n):
        return [self.tools.csnap, "lockd", "--config", str(self.dir(n) / "lockd.toml")]

    def agent_lines(self):
        return f"lockd = [{self.quoted()}]\n"

    def reigns(self, n):
        """Terms in which a replica has led, by its log."""
        return [int(term) for term in re.findall(r"leads the group in term (\d+)", self.log(n))]

    def leader(self):
        reigns = {n: self.reigns(n)[-1] for n in range(REPLICAS) if self.reigns(n)}
        last = max(reigns, key=reigns.get, default=None)
        if last is None or not self.alive(last):
            return None
        log = self.log(last)
        deposed = log.rfind("leads the group no more") > log.rfind("leads the group in term")
        return None if deposed else last

    def elections(self):
        """Leaders that there have been."""
        return sum(len(self.reigns(n)) for n in range(REPLICAS))

    def restart(self, n):
        """Starts a killed replica, and waits until the others reach it."""
        others = [other for other in range(REPLICAS) if other != n and self.alive(other)]
        reached = f"replica at {self.peers[n]} is reached"
        before = {other: self.log(other).count(reached) for other in others}
        self.start_one(n)
        wait_until(f"{self.name} is whole again",
                   lambda: all(self.log(other).count(reached) > before[other] for other in others), 60)


class EtcdGroup(Group):
    """etcd, three times."""
    system = "etcd"
    prefix = "/csnap/bench"
    server_lock = f"{prefix}/lock"

    def __init__(self, tools, work, name, heartbeat_ms=100, election_ms=1000):
        super().__init__(tools, work, name)
        self.heartbeat_ms, self.election_ms = heartbeat_ms, election_ms

    def command(self, n):
        members = ",".join(f"r{n + 1}=http://{peer}" for n, peer in enumerate(self.peers))
        client, peer = f"http://{self.addresses[n]}", f"http://{self.peers[n]}"
        return [self.tools.etcd, "--name", f"r{n + 1}", "--data-dir", str(self.dir(n) / "data"),
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", members,
                "--heartbeat-interval", str(self.heartbeat_ms), "--election-timeout", str(self.election_ms),
                "--logger", "zap", "--log-outputs", "stderr", "--log-level", "warn"]

    def agent_lines(self):
        return f'[etcd]\nendpoints = [{self.quoted()}]\nprefix = "{self.prefix}"\n'

    def metric(self, n, name):
        """Zero if the replica does not answer."""
        try:
            text = urllib.request.urlopen(f"http://{self.addresses[n]}/metrics", timeout=2).read().decode()
        except (OSError, urllib.error.URLError):
            return 0.0
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def leader(self):
        leaders = [n for n in range(REPLICAS) if self.alive(n) and self.metric(n, "etcd_server_is_leader") == 1]
        return leaders[0] if len(leaders) == 1 else None

    def elections(self):
        return max(int(self.metric(n, "etcd_server_leader_changes_seen_total")) for n in range(REPLICAS))

    def restart(self, n):
        self.start_one(n)
        wait_until(f"{self.name} is whole again", lambda: self.metric(n, "etcd_server_has_leader") == 1, 60)
