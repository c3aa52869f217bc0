"""One measurement: a job of fio's nbd engine against a URI."""
import json
import subprocess
from dataclasses import dataclass


@dataclass
class Job:
    """What fio does, and which figure of it counts."""
    rw: str
    bs: str
    depth: int
    unit: str
    once: bool = False  # every block at most once: what is measured happens only the first time


JOBS = {
    "read-q32": Job("randread", "4k", 32, "IOPS"),
    "write-q32": Job("randwrite", "4k", 32, "IOPS"),
    "read-q1": Job("randread", "4k", 1, "IOPS"),
    "write-q1": Job("randwrite", "4k", 1, "IOPS"),
    "seq-read": Job("read", "1M", 8, "MiB/s"),
    "seq-write": Job("write", "1M", 8, "MiB/s"),
    "first-overwrite": Job("randwrite", "4k", 32, "IOPS", once=True),
}


def run_fio(job, uri, seconds, size_mib):
    """IOPS or MiB/s of one run."""
    job = JOBS[job]
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={job.rw}", f"--bs={job.bs}",
        f"--iodepth={job.depth}", f"--size={size_mib}M", f"--runtime={seconds}", "--output-format=json",
        "--randrepeat=0", "--gtod_reduce=1", "--refill_buffers=0", "--buffer_pattern=0x5a5aa5a5",
    ]
    if not job.once:
        command.append("--time_based")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"fio failed on {uri}: {done.stderr or done.stdout}")
    text = done.stdout[done.stdout.index("{"):]
    side = json.loads(text)["jobs"][0]["read" if "read" in job.rw else "write"]
    return side["iops"] if job.unit == "IOPS" else side["bw_bytes"] / (1 << 20)
