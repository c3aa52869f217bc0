"""The lead of a group is moved by an operator's command while clients write: how long the slowest of them waits."""
import random
import subprocess

from groups import REPLICAS, LockdGroup, Running
from load import Lines, boot_us, rest
from report import progress, times_table

CLIENTS = 8
GOAL_MS = 50
WITHOUT, WITH = "no move", "`csnap lockd move`"


def measure_move(tools, work, args):
    group = LockdGroup(tools, work, "lockd")
    stalls, given_up = {WITHOUT: [], WITH: []}, []
    with Running(group), Writers(tools, group) as writers:
        for run in range(args.runs):
            for name in random.sample(list(stalls), len(stalls)):
                stall_ms, error = one_turn(tools, group, writers, moves=name == WITH)
                stalls[name].append(stall_ms)
                given_up += [error] * bool(error)
            progress(f"move {run + 1} of {args.runs}")
    title = f"longest time of {CLIENTS} clients between two acknowledgements, ms"
    table = times_table(title, stalls, {WITH: GOAL_MS})
    said = f", the first with: {given_up[0]}" if given_up else ""
    return {"stalls_ms": stalls, "given_up": given_up}, f"{table}\n\nMoves that were given up: {len(given_up)}{said}."


def one_turn(tools, group, writers, moves):
    """The longest stall around a move, or around a command that only looks; and what the command failed with."""
    leader = group.wait_for_leader()
    rest(0.2, 0.5)
    from_us = boot_us()
    rest(0.05, 0.1)
    if moves:
        to = random.choice([n for n in range(REPLICAS) if n != leader])
        error = lockd(tools, group, "move", f"n{to + 1}")
    else:
        error = lockd(tools, group, "show")
    rest(0.3, 0.3)
    return writers.stall_ms(from_us, boot_us()), error


def lockd(tools, group, *arguments):
    """None, or its error."""
    command = [tools.csnap, "lockd", *arguments, "--lockd", ",".join(group.addresses)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


class Writers(Lines):
    """Clients that each write all the time."""

    def __init__(self, tools, group):
        super().__init__(tools, "writes", "--system", group.system, "--clients", CLIENTS,
                         "--addresses", ",".join(group.addresses))
        self.last_us = {}
        self.until(lambda line: self.acknowledged(line) and len(self.last_us) == CLIENTS)

    def acknowledged(self, line):
        self.last_us[line["client"]] = line["acknowledged_us"]
        return True

    def stall_ms(self, from_us, to_us):
        """The longest time between two acknowledgements of one client, any of it between two moments."""
        longest_us = 0
        while min(self.last_us.values()) < to_us:
            line = self.next()
            before_us = self.last_us[line["client"]]
            self.acknowledged(line)
            if line["acknowledged_us"] > from_us and before_us < to_us:
                longest_us = max(longest_us, line["acknowledged_us"] - before_us)
        return longest_us / 1000
