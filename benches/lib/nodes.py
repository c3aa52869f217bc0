"""Three nodes with an agent, a server, an exporter and a replica of lockd or etcd each, on this machine: every daemon
started from its configuration file alone."""
import json
import os
import signal
import subprocess

from groups import REPLICAS
from systems import wait_until


class Nodes:
    """Three nodes whose agents use the replicas of a group, which the binary can."""

    def __init__(self, binary, work, group):
        self.binary, self.work, self.group = binary, work, group
        self.agents = [None] * REPLICAS

    def start(self):
        self.group.start()
        self.csnap("pool", "create", str(self.work / "pool"))
        for n in range(REPLICAS):
            home = self.home(n)
            home.mkdir()
            (home / "agent.toml").write_text(
                f'node = "n{n + 1}"\npool = "{self.work}/pool"\n'
                f'agent_sock = "{home}/agent.sock"\nnbd_unix = "{home}/nbd.sock"\nstate = "{home}/state"\n'
                + self.group.agent_lines())
            self.start_agent(n)
        self.wait_whole()

    def home(self, n):
        return self.work / f"n{n + 1}"

    def start_agent(self, n):
        with open(self.home(n) / "log", "ab") as log:
            command = [self.binary, "agent", "--config", str(self.home(n) / "agent.toml")]
            self.agents[n] = subprocess.Popen(command, stdout=log, stderr=log)

    def csnap(self, *arguments):
        done = subprocess.run([self.binary, "--dir", str(self.work), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"csnap {' '.join(arguments[:2])}: {done.stderr.strip()}")
        return done.stdout

    def status(self):
        """None while no agent answers."""
        done = subprocess.run([self.binary, "--dir", str(self.work), "status", "--json"], capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def node(self, n, status=None):
        nodes = (status or self.status())["nodes"]
        return next((node for node in nodes if node["id"] == f"n{n + 1}"), None)

    def serving(self):
        """The node that serves."""
        return int(self.status()["server"]["node"][1:]) - 1

    def is_whole(self):
        status = self.status()
        if status is None or status["server"]["state"] != "serving":
            return False
        nodes = [self.node(n, status) for n in range(REPLICAS)]
        ready = lambda node: node["nbd"] and node["server_pid"] and (  # noqa: E731
            node["standby_ready"] or node["id"] == status["server"]["node"])
        return all(node and ready(node) for node in nodes)

    def wait_whole(self):
        wait_until("every node is ready", self.is_whole, 60)

    def processes(self, n):
        """Agent, server, exporter and replica of a node."""
        node = self.node(n)
        pids = (self.agents[n].pid, node["server_pid"], node["export_pid"], self.group.pids()[n])
        return [pid for pid in pids if pid]

    def place_server(self, with_leader):
        """The server on the node whose replica leads, or on another one."""
        leader = self.group.wait_for_leader()
        if (self.serving() == leader) != with_leader:
            to = leader if with_leader else (leader + 1) % REPLICAS
            self.csnap("server", "move", f"n{to + 1}")
            self.wait_whole()

    def repair(self, n):
        """A node that was lost comes back."""
        self.agents[n].wait()
        self.group.kill(n)
        self.group.restart(n)
        self.start_agent(n)
        self.wait_whole()

    def stop(self):
        """Agents end by themselves, and their servers with them; exporters would outlive them."""
        status = self.status()
        exporters = [node["export_pid"] for node in (status or {"nodes": []})["nodes"] if node["export_pid"]]
        for agent in self.agents:
            if agent and agent.poll() is None:
                agent.terminate()
                agent.wait()
        end(exporters)
        self.group.stop()


def end(pids):
    """Kills whatever is left of some processes."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
