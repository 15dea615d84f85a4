"""Measure what an export costs: seconds, CPU seconds, and the most memory that its processes hold at once.

python -m tools.measure_export --workdir=runs/quickstart --to=torch --out=exports/measured
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from launch import cli

INTERVAL = 0.02  # seconds between looks at the memory


def main(values: flags.FlagValues) -> None:
    """Export in a process of its own; print one line of JSON."""
    workdir = cli.require(values, "workdir", "runs/quickstart")
    target, out = cli.require(values, "to", "torch"), cli.require(values, "out", "exports/measured")
    options = [f"--workdir={workdir}", f"--to={target}", f"--out={out}", f"--dtype={values.dtype}"]
    command = [sys.executable, "-m", "launch.export", *options, f"--data={values.data}"]
    began, most = time.perf_counter(), [0]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, _resident(process.pid), key=sum)
        time.sleep(INTERVAL)
    used = os.times()
    if process.returncode:
        sys.exit(process.returncode)
    record = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))["aether"]
    size = record["parameters"] * (4 if record["dtype"] == "float32" else 2)
    result = dict(to=target, dtype=record["dtype"], parameters=record["parameters"], parameters_mb=size / 1e6)
    result |= dict(seconds=time.perf_counter() - began, cpu_seconds=used.children_user + used.children_system)
    result |= dict(peak_mb=sum(most) / 1e6, of_processes_mb=[round(held / 1e6) for held in most])
    result |= dict(times_the_parameters=sum(most) / size)
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


def _resident(pid: int) -> list[int]:
    """Return the bytes in memory of a process and of those that it started, from /proc (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []  # it has ended
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return [int(found[1]) * 1024 if found else 0, *(n for child in children for n in _resident(int(child)))]


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags()
    flags.DEFINE_string("workdir", "", "folder of the run", values)
    flags.DEFINE_string("to", "", "framework", values)
    flags.DEFINE_string("out", "", "new folder of the export", values)
    flags.DEFINE_string("data", "", "what to compare on (empty: the run's first validation set)", values)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "of the parameters that are written", flag_values=values
    )
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
