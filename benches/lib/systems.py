"""The systems that are compared: how each is started, snapshotted and stopped."""
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Tools:
    """Everything that must be installed; says what is missing before anything starts."""

    def __init__(self):
        metadata = subprocess.run(
            ["cargo", "metadata", "--format-version", "1", "--no-deps"], cwd=ROOT, capture_output=True, text=True,
            check=True)
        target = Path(json.loads(metadata.stdout)["target_directory"])
        self.csnap = os.environ.get("CSNAP_BIN", str(target / "release" / "csnap"))
        missing = [t for t in ("fio", "nbdkit", "nbdcopy", "qemu-nbd", "qemu-img") if not shutil.which(t)]
        if missing:
            raise SystemExit(f"missing: {', '.join(missing)}; Debian has them in fio, nbdkit, libnbd-bin, qemu-utils")
        if not Path(self.csnap).exists():
            raise SystemExit("no csnap binary: run cargo build --release first")


def wait_for(path, process, what):
    """Until a socket is there, or the process that should make it is not."""
    deadline = time.monotonic() + 30
    while not Path(path).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{what} did not start")
        time.sleep(0.01)


def write_raw(path, size_mib):
    """A fully written raw disk."""
    block = os.urandom(1 << 20)
    with open(path, "wb") as disk:
        for _ in range(size_mib):
            disk.write(block)
        os.fsync(disk.fileno())


class System:
    """A server of one disk on a unix socket."""
    has_snapshots = False

    def __init__(self, tools, work, name):
        self.tools, self.work, self.name = tools, work, name
        self.process = None
        work.mkdir(parents=True)
        self.socket = work / "nbd.sock"

    @property
    def uri(self):
        return f"nbd+unix:///?socket={self.socket}"

    def pids(self):
        """The processes between a guest and its data."""
        return [self.process.pid]

    def cpu_seconds(self):
        """Processor time that they have taken, their kernel threads included."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def settle(self):
        """Until nothing of what was asked for is still being done."""

    def spawn(self, command):
        log = open(self.work / "log", "ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self.socket, self.process, self.name)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Nbdkit(System):
    """nbdkit's file plugin: a raw file, threads, nothing else."""

    def __init__(self, tools, work):
        super().__init__(tools, work, "nbdkit")

    def start(self, size_mib):
        write_raw(self.work / "disk", size_mib)
        self.spawn(["nbdkit", "-f", "-U", str(self.socket), "file", str(self.work / "disk")])


class QemuNbd(System):
    """qemu-nbd with a raw or qcow2 disk; internal snapshots are made while it is stopped, as they must be."""

    def __init__(self, tools, work, form):
        super().__init__(tools, work, form)
        self.form, self.disk = form, work / f"disk.{form}"
        self.has_snapshots = form == "qcow2"

    def start(self, size_mib):
        if self.form == "raw":
            write_raw(self.disk, size_mib)
        else:
            raw = self.work / "source"
            write_raw(raw, size_mib)
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, self.disk], check=True)
            raw.unlink()
        self.serve()

    def serve(self):
        self.socket.unlink(missing_ok=True)
        self.spawn(["qemu-nbd", "-f", self.form, "-k", str(self.socket), "-t", "--cache=writeback", str(self.disk)])

    def edit(self, *arguments):
        self.stop()
        subprocess.run(["qemu-img", "snapshot", *arguments, str(self.disk)], check=True)
        self.serve()

    def snapshot(self, name):
        self.edit("-c", name)

    def drop_snapshot(self, name):
        self.edit("-d", name)


class Csnap(System):
    """`csnap up` with one node, or more; node 1 exports the disk."""
    has_snapshots = True

    def __init__(self, tools, work, name):
        super().__init__(tools, work, name)
        self.data = work / "data"
        self.socket = self.data / "nbd.sock"

    @property
    def uri(self):
        return self.uri_of("disk")

    def uri_of(self, volume):
        return f"nbd+unix:///{volume}?socket={self.socket}"

    def run(self, *arguments):
        """A command's result, whatever it is."""
        command = [self.tools.csnap, "--dir", str(self.data), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def csnap(self, *arguments):
        """What a command prints that must succeed."""
        done = self.run(*arguments)
        if done.returncode != 0:
            raise SystemExit(f"{self.name}: csnap {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def up(self, nodes=1):
        self.socket.unlink(missing_ok=True)
        self.spawn([self.tools.csnap, "--dir", str(self.data), "up", "--nbd", "127.0.0.1:0", "--nodes", str(nodes)])
        wait_until(f"{self.name} serves", lambda: self.serves(nodes))

    def serves(self, nodes):
        status = self.status()
        ready = [node for node in status["nodes"] if node["nbd"] and node["server_pid"]]
        return status["server"]["state"] == "serving" and len(ready) == nodes

    def start(self, size_mib):
        self.up()
        raw = self.work / "source"
        write_raw(raw, size_mib)
        self.csnap("volume", "create", "disk", "--from", str(raw))
        raw.unlink()

    def status(self):
        return json.loads(self.csnap("status", "--json"))

    def pids(self):
        status = self.status()
        return [status["server"]["pid"], status["nodes"][0]["export_pid"]]

    def volume(self, name="disk"):
        return json.loads(self.csnap("--json", "volume", "show", name))

    def snapshot(self, *names, volume="disk"):
        self.csnap("snapshot", "create", *(f"{volume}@{name}" for name in names))

    def drop_snapshot(self, *names, volume="disk"):
        self.csnap("snapshot", "delete", *(f"{volume}@{name}" for name in names))

    def store_mib(self):
        """What the store of snapshots takes on disk."""
        done = subprocess.run(["du", "-sk", str(self.data / "pool" / "store")], capture_output=True, text=True)
        return int(done.stdout.split()[0]) / 1024  # files that vanish meanwhile are no error

    def settle(self):
        """Until the last guest has left and nothing is reaped or given back any more."""
        looks = []

        def at_rest():
            status = self.status()
            if status["pool"] is None or any(volume["attached"] for volume in status["volumes"]):
                return False
            looks.append((status["pool"]["used_bytes"], status["pool"]["held_bytes"], self.store_mib()))
            time.sleep(0.1)
            return looks[-3:] == looks[-1:] * 3

        wait_until(f"{self.name} is at rest", at_rest)


def wait_until(what, holds, seconds=300):
    """Looks often; gives up the whole measurement when it takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited too long until {what}")
        time.sleep(0.01)
