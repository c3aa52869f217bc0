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
    """`csnap up` with one node."""
    has_snapshots = True

    def __init__(self, tools, work, name):
        super().__init__(tools, work, name)
        self.socket = work / "data" / "nbd.sock"

    @property
    def uri(self):
        return f"nbd+unix:///disk?socket={self.socket}"

    def csnap(self, *arguments):
        command = [self.tools.csnap, "--dir", str(self.work / "data"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, size_mib):
        self.spawn([self.tools.csnap, "--dir", str(self.work / "data"), "up", "--nbd", "127.0.0.1:0"])
        raw = self.work / "source"
        write_raw(raw, size_mib)
        self.csnap("volume", "create", "disk", "--from", str(raw))
        raw.unlink()

    def snapshot(self, name):
        self.csnap("snapshot", "create", f"disk@{name}")

    def drop_snapshot(self, name):
        self.csnap("snapshot", "delete", f"disk@{name}")
