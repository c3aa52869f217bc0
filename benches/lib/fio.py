"""One measurement: a job of fio's nbd engine against a URI."""
import json
import subprocess
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Job:
    """What fio does, and which figure of it counts."""
    rw: str
    bs: str
    depth: int
    unit: str
    once: bool = False  # every block at most once: what is measured happens only the first time


class Run(NamedTuple):
    """What one run showed."""
    figure: float  # in the unit of its job
    requests: int
    client_us: float  # processor time of fio itself, microseconds a request


JOBS = {
    "read-q32": Job("randread", "4k", 32, "IOPS"),
    "write-q32": Job("randwrite", "4k", 32, "IOPS"),
    "read-q1": Job("randread", "4k", 1, "IOPS"),
    "write-q1": Job("randwrite", "4k", 1, "IOPS"),
    "seq-read": Job("read", "1M", 8, "MiB/s"),
    "seq-write": Job("write", "1M", 8, "MiB/s"),
    "first-overwrite": Job("randwrite", "4k", 32, "IOPS", once=True),
}


def run_fio(job, uri, seconds, size_mib, ramp_seconds=0):
    """One run, not counting what comes before the ramp's end."""
    job = JOBS[job]
    extra = [f"--runtime={seconds}", "--gtod_reduce=1"]
    if ramp_seconds:
        extra.append(f"--ramp_time={int(ramp_seconds * 1000)}ms")
    if not job.once:
        extra.append("--time_based")
    side = finish(start(uri, job.rw, job.bs, job.depth, size_mib, *extra))
    figure = side["iops"] if job.unit == "IOPS" else side["bw_bytes"] / (1 << 20)
    return Run(figure, side["total_ios"], side["client_us"])


def start(uri, rw, bs, depth, size_mib, *extra):
    """A run of fio in the background."""
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}",
        f"--size={size_mib}M", "--output-format=json", "--randrepeat=0", "--refill_buffers=0",
        "--buffer_pattern=0x5a5aa5a5", *extra,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run):
    """What fio says of its reads or writes, once it ended."""
    out, error = run.communicate()
    if run.returncode != 0:
        raise SystemExit(f"fio failed: {' '.join(run.args)}: {error or out}")
    job = json.loads(out[out.index("{"):])["jobs"][0]
    side = job["read" if "read" in job["job options"]["rw"] else "write"]
    busy_ms = job["job_runtime"] * (job["usr_cpu"] + job["sys_cpu"]) / 100
    return {**side, "client_us": busy_ms * 1000 / max(side["total_ios"], 1)}
