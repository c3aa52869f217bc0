"""A guest of `csnap up --nodes 3` writes while one of the three lockds is killed: what it sees of that."""
import json
import os
import random
import signal
import time

import fio
from report import progress, times_table
from systems import Csnap, wait_until

NODES = 3
SIZE_MIB = 64
DEPTH = 8
GUEST_IOPS = 1000  # far from saturated
TURN_SECONDS = 2.0
KILL_AFTER_SECONDS = (0.1, 1.0)  # of a turn's start: a killed lockd is back before its end
BEYOND_MS = 50  # of the control, that a kill may cost
WITHOUT, WITH = "nobody killed", "a lockd killed"


def measure_guest(tools, work, args):
    system = Csnap(tools, work, "csnap up")
    turns = {WITHOUT: [], WITH: []}
    system.up(NODES)
    try:
        wait_whole(system)
        system.csnap("volume", "create", "disk", "--size", f"{SIZE_MIB}M")
        with Guest(system) as guest:
            for run in range(args.runs):
                for name in random.sample(list(turns), len(turns)):
                    turns[name].append(one_turn(system, guest, kills=name == WITH))
                progress(f"guest {run + 1} of {args.runs}")
            errors = guest.stop()
    finally:
        system.stop()
    gaps = {name: [guest.longest_ms(from_s, to_s) for from_s, to_s, _ in turns[name]] for name in turns}
    takeovers = {name: sum(new for _, _, new in turns[name]) for name in turns}
    return {"gaps_ms": gaps, "errors": errors, "takeovers": takeovers}, guest_table(gaps, errors, takeovers)


def guest_table(gaps, errors, takeovers):
    table = times_table("a guest's longest gap, ms", gaps, {})
    beyond = max(gaps[WITH]) - max(gaps[WITHOUT])
    verdict = "yes" if beyond <= BEYOND_MS else "no"
    servers = ", ".join(f"{count} with {name}" for name, count in takeovers.items())
    return (f"{table}\n\nMax gap no more than control max + {BEYOND_MS} ms: {verdict} ({beyond:+.1f} ms). "
            f"I/O errors: {errors}. Takeovers of the server: {servers}.")


def one_turn(system, guest, kills):
    """From when to when it lasted, by the wall clock, and how many terms of the server have begun since. After a
    snapshot, most writes need the server."""
    term = system.status()["server"]["term"]
    pid = random.choice(lockd_pids(system))
    system.snapshot("turn")
    time.sleep(0.2)
    guest.check()
    from_s = time.time()
    moment = random.uniform(*KILL_AFTER_SECONDS)
    time.sleep(moment)
    if kills:
        os.kill(pid, signal.SIGKILL)
    time.sleep(TURN_SECONDS - moment)
    to_s = time.time()
    wait_whole(system, pid if kills else None)
    wait_until("the server serves", lambda: system.serves(NODES), 60)
    system.drop_snapshot("turn")
    return from_s, to_s, system.status()["server"]["term"] - term


def lockds(system):
    done = system.run("lockd", "show", "--json")
    return json.loads(done.stdout) if done.returncode == 0 else {"leader": None, "members": []}


def lockd_pids(system):
    return [member["pid"] for member in lockds(system)["members"]]


def wait_whole(system, without=None):
    """Three lockds are a group, and none of them is the one that was killed."""
    def whole():
        group = lockds(system)
        well = [member for member in group["members"] if member["state"] in ("leads", "follows") and member["votes"]]
        return group["leader"] and len(well) == NODES and without not in [member["pid"] for member in well]

    wait_until("three lockds are a group", whole, 60)


class Guest:
    """fio on node 1's exporter, which logs every write with its time, and goes on after errors."""

    def __init__(self, system):
        self.log = system.work / "guest"
        self.run = fio.start(
            system.uri, "randwrite", "4k", DEPTH, SIZE_MIB, "--time_based", "--runtime=86400",
            f"--rate_iops={GUEST_IOPS}", "--continue_on_error=io",
            f"--write_lat_log={self.log}", "--log_unix_epoch=1", "--disable_slat=1")
        self.writes = []
        wait_until("the guest writes", lambda: system.volume()["attached"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.run.poll() is None:
            self.run.kill()
            self.run.communicate()

    def check(self):
        if self.run.poll() is not None:
            raise SystemExit(f"the guest ended: {self.run.communicate()[1].strip()}")

    def stop(self):
        """How many errors it saw."""
        self.check()
        self.run.send_signal(signal.SIGINT)
        out, _ = self.run.communicate()
        for line in self.log.with_name(f"{self.log.name}_clat.1.log").read_text().splitlines():
            ended_ms, took_ns = line.split(",")[:2]
            took_ms = int(took_ns) / 1e6
            self.writes.append((int(ended_ms), took_ms))
        return json.loads(out[out.index("{"):])["jobs"][0]["total_err"]

    def longest_ms(self, from_s, to_s):
        """The longest that a write took that was outstanding between two moments: no gap between completions is longer.
        What a turn stalled ends before the next one begins, since a snapshot waits for it."""
        from_ms, to_ms = from_s * 1000, to_s * 1000
        return max(took_ms for ended_ms, took_ms in self.writes if ended_ms >= from_ms and ended_ms - took_ms <= to_ms)
