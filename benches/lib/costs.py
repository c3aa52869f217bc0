"""What snapshots cost besides throughput: making them, listing, deleting, taking over, memory."""
import os
import re
import signal
import statistics
import time
from pathlib import Path

import fio
from systems import Csnap, wait_until

CREATES = 100  # as many as the server's own figures are of
GUEST_IOPS = 1000  # of a guest that is watched while the server is killed: far from saturated
GUEST_SECONDS = 3
DELETE_SECONDS_MAX = 300
RESERVED_MIB_MAX = 17  # one step of an arena, and directories


class CreateCosts:
    """Snapshot creates as the server times them, on small and large volumes, empty and not, busy and not."""

    def __init__(self, tools, work, many):
        self.system = Csnap(tools, work, "creates")
        self.many, self.rows, self.made = many, [], {}

    def measure(self):
        self.system.up()
        try:
            for name, size in (("1 GiB", "1G"), ("15 TiB", "15T")):
                self.measure_volume(name, size)
        finally:
            self.system.stop()
        return self.rows

    def measure_volume(self, name, size):
        volume = f"v{size}"
        self.system.csnap("volume", "create", volume, "--size", size)
        size_mib = self.system.volume(volume)["size_bytes"] >> 20
        uri = self.system.uri_of(volume)
        self.take(name, "empty", volume, CREATES)
        # Norandommap: a bit for every block of 15 TiB would be half a gigabyte.
        filling = ["--io_size=64M", "--norandommap"]
        fio.finish(fio.start(uri, "randwrite", "4k", 32, size_mib, *filling))
        self.system.settle()
        self.take(name, "64 MiB of data", volume, CREATES)
        endless = ["--time_based", "--runtime=600", "--norandommap", f"--rate_iops={GUEST_IOPS}"]
        guest = fio.start(uri, "randwrite", "4k", 8, size_mib, *endless)
        try:
            wait_until("the guest writes", lambda: self.system.volume(volume)["attached"])
            self.take(name, "a guest writes", volume, CREATES)
            self.take(name, "a guest writes", volume, max(CREATES, self.many - self.made[volume]))
        finally:
            guest.terminate()
            guest.communicate()
        self.system.settle()
        self.take(name, "more data", volume, CREATES)

    def take(self, name, what, volume, creates):
        """Makes so many; what the server says of the last of them."""
        yardstick = sync_ms(self.system.work / "yardstick")
        before = self.made.get(volume, 0)
        self.made[volume] = before + creates
        self.system.snapshot(*(f"s{n}" for n in range(before, before + creates)), volume=volume)
        times = self.system.status()["server"]["snapshot_creates"]
        self.rows.append({"volume": name, "what": what, "snapshots": self.made[volume], "sync_ms": yardstick, **times})


def sync_ms(path, times=CREATES):
    """What this disk takes, just now, to make 4 KiB durable: the median. A create needs that once or twice."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    block = os.urandom(4096)

    def sync():
        os.pwrite(file, block, 0)
        os.fdatasync(file)

    median = statistics.median(seconds_of(sync) for _ in range(times)) * 1000
    os.close(file)
    return median


def too_large(system):
    """A volume that the file system cannot take: what is said of it, and whether anything is left behind."""
    size = None
    probe = system.work / "probe"
    with open(probe, "wb") as file:
        for shift in range(40, 63):
            try:
                os.ftruncate(file.fileno(), 1 << shift)
            except OSError:
                size = 1 << shift
                break
    probe.unlink()
    if size is None:
        return {"size_bytes": None, "said": "this file system takes every size that a volume can have", "good": True}
    heads = lambda: sorted(os.listdir(system.data / "pool" / "head"))  # noqa: E731
    before = heads()
    done = system.run("volume", "create", "huge", "--size", str(size))
    good = done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout and heads() == before
    good = good and system.run("volume", "show", "huge").returncode == 1
    return {"size_bytes": size, "said": done.stderr.strip(), "good": good}


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def memory(system):
    """Resident memory of the server and of node 1's exporter, MiB."""
    status = system.status()
    return {"server_mib": resident_mib(status["server"]["pid"]),
            "export_mib": resident_mib(status["nodes"][0]["export_pid"])}


def seconds_of(action):
    began = time.monotonic()
    action()
    return time.monotonic() - began


def listing(system):
    """Seconds of `csnap snapshot list`, the command's start included; median of five."""
    return statistics.median(seconds_of(lambda: system.csnap("snapshot", "list", "disk")) for _ in range(5))


def stall(system, size_mib, kill):
    """Longest wait of a guest's first write after a snapshot, ms; with `kill`, the server dies meanwhile."""
    guest = fio.start(
        system.uri, "randwrite", "4k", 8, size_mib, f"--runtime={GUEST_SECONDS}", f"--rate_iops={GUEST_IOPS}")
    if kill:
        wait_until("the guest writes", lambda: system.volume()["attached"])
        time.sleep(GUEST_SECONDS / 3)
        os.kill(system.status()["server"]["pid"], signal.SIGKILL)
    longest = fio.finish(guest)["clat_ns"]["max"] / 1e6
    return longest


def stalls(system, size_mib, times, nodes):
    """Stalls of guests whose server is killed, and of one whose server is not."""
    system.snapshot("stall")
    quiet = stall(system, size_mib, kill=False)
    killed = []
    for _ in range(times):
        killed.append(stall(system, size_mib, kill=True))
        wait_until(f"{system.name} serves again", lambda: system.serves(nodes))
    system.drop_snapshot("stall")
    system.settle()
    return {"quiet_ms": quiet, "killed_ms": killed}


def delete_all(system, names):
    """Seconds until every delete is acknowledged, and until the store is empty but for what is reserved ahead."""
    mib_before = system.store_mib()
    began = time.monotonic()
    if names:
        system.drop_snapshot(*names)
    acknowledged = time.monotonic() - began
    wait_until(f"{system.name} gives its space back", lambda: is_back(system), DELETE_SECONDS_MAX)
    back = time.monotonic() - began
    return {"acknowledged_s": acknowledged, "back_s": back, "mib_before": mib_before, "mib_after": system.store_mib()}


def is_back(system):
    status = system.status()
    none = status["volumes"] is not None and all(volume["store_bytes"] == 0 for volume in status["volumes"])
    return none and system.store_mib() <= RESERVED_MIB_MAX
