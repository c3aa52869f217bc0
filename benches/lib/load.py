"""The load generator, `csnap-load`, as the driver uses it."""
import json
import queue
import random
import signal
import subprocess
import threading
import time

LINE_SECONDS_MAX = 60
RAMP_SECONDS = 0.3  # of throughput, not counted


def boot_us():
    """Microseconds of the clock that the load generator's lines have."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def rest(shortest, longest):
    """So that a kill falls anywhere between two heartbeats."""
    time.sleep(random.uniform(shortest, longest))


def throughput(tools, group, job, clients, seconds):
    """One measurement; with the processor time of the group, microseconds a pair."""
    command = [tools.load, "throughput", "--system", group.system, "--addresses", ",".join(group.addresses),
               "--job", job, "--clients", str(clients), "--seconds", str(seconds), "--ramp-seconds", str(RAMP_SECONDS)]
    before = group.cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{group.name}, {job}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    found["pairs"] = max(found["pairs"], 1)  # a disk that stalls for all of a tiny run
    found["pairs_per_second"] = found["pairs"] / found["seconds"]
    # The ramp, which is not counted, takes as much a pair.
    share = found["seconds"] / (found["seconds"] + RAMP_SECONDS)
    found["servers_us"] = (group.cpu_seconds() - before) * share / found["pairs"] * 1e6
    return found


class Lines:
    """A command of the load generator that goes on, and what it says."""

    def __init__(self, tools, *arguments):
        self.what = arguments[0]
        command = [tools.load, *(str(argument) for argument in arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def next(self):
        """The next line; it has to come."""
        try:
            line = self.lines.get(timeout=LINE_SECONDS_MAX)
        except queue.Empty:
            raise SystemExit(f"csnap-load {self.what} says nothing for {LINE_SECONDS_MAX} s") from None
        if line is None:
            raise SystemExit(f"csnap-load {self.what} ended")
        return line

    def until(self, holds):
        """The first line of which it holds."""
        while True:
            line = self.next()
            if holds(line):
                return line

    def send(self, name):
        self.process.send_signal(name)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
