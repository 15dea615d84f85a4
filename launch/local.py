"""Train with several processes on this machine, on its GPUs or its CPU, as they would on as many machines.

python -m launch.local --processes=2 -- --config=configs/quickstart.py --workdir=runs/first

What follows the -- goes to every `python -m launch.train`. Process 0 writes to the screen as it would alone; the
others' lines begin with their number. SIGTERM and Ctrl-C are passed on, and a run that saved ends with exit code 75.
When a process dies all end, and with --restarts they start again from the last checkpoint.
"""

import importlib.util
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from absl import flags

from aether.errors import CheckError, InputError, Stopped
from launch import cli
from launch.children import Child

FLAGS = cli.new_flags()
flags.DEFINE_integer("processes", 1, "processes to start", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("devices", 0, "CPU devices of each (0: GPUs if there are, else 1)", 0, flag_values=FLAGS)
flags.DEFINE_integer("restarts", 0, "how often to start again after a failure", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_string("module", "launch.train", "what each process runs, as python -m does", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "print the commands and their environment, and start nothing", flag_values=FLAGS)

LASTING = (InputError.exit_code, CheckError.exit_code, Stopped.exit_code)  # another try would end the same way
TOGETHER = 15.0  # seconds after one has failed in which the others end by themselves
FINISH = 60.0  # seconds after one is done in which the others are
LONGEST_PAUSE = 30.0  # seconds before another try


def main(args: flags.FlagValues, rest: list[str]) -> int:
    """Start the processes, again if they fail, and return the exit code.

    Raises:
      InputError: the GPUs cannot be shared evenly.
    """
    if args.module == "launch.train" and not rest:
        raise InputError(
            "nothing follows --; give what launch.train takes there, as in -- --config=FILE --workdir=DIR."
        )
    _check(args, rest)
    command = [sys.executable, "-m", args.module, *rest]
    shares = devices(args.processes, args.devices, os.environ)
    if args.dry_run:
        for variables in environments(shares, free_port()):
            words = [f"{k}={shlex.quote(v)}" for k, v in variables.items()]
            print(" ".join([*words, shlex.join(command)]))
        return 0
    with passed_on() as signals:
        for attempt in range(args.restarts + 1):
            code, why = Job(command, environments(shares, free_port()), signals).run()
            if code == 0 or code in LASTING or signals.seen:
                return code
            pause = min(2.0**attempt, LONGEST_PAUSE)
            if attempt == args.restarts:
                _say(f"{why}; that was {'the only try' if not attempt else f'try {attempt + 1} of {attempt + 1}'}.")
                return code
            _say(f"{why}; restart {attempt + 1} of {args.restarts} in {pause:.0f} s.")
            if signals.wait(pause):
                return Stopped.exit_code
    raise AssertionError("unreachable")


def _check(args: flags.FlagValues, rest: list[str]) -> None:
    try:
        found = importlib.util.find_spec(args.module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(f"--module is {args.module!r}, which this Python does not find.")
    if args.dry_run and args.module == "launch.train" and not cli.HELP & set(rest):
        from launch import train

        cli.parse(train.FLAGS, rest)
        if not train.FLAGS.report:
            cli.config_of(train.FLAGS)


def devices(processes: int, cpus: int, env: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the variables that give each process its devices: a share of the GPUs, or CPU devices.

    Args:
      processes: how many.
      cpus: CPU devices of each; 0: the GPUs if there are some, else one.
      env: what says which GPUs may be used.

    Raises:
      InputError: the GPUs cannot be shared evenly.
    """
    gpus = [] if cpus or env.get("JAX_PLATFORMS") == "cpu" else visible_gpus(env)
    if not gpus:
        return [{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpus or 1)}] * processes
    if len(gpus) % processes:
        raise InputError(
            f"--processes is {processes} and this machine shows {len(gpus)} GPUs; give a number that divides them, "
            "or --devices=K for K CPU devices each."
        )
    share = len(gpus) // processes
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(processes)]


def visible_gpus(env: Mapping[str, str], folder: Path = Path("/dev")) -> list[str]:
    """Return the GPUs that CUDA would show, by its own names."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    numbers = sorted(int(p.name[6:]) for p in folder.glob("nvidia[0-9]*") if p.name[6:].isdecimal())
    return [str(i) for i in range(len(numbers))]


def environments(shares: list[dict[str, str]], port: int) -> list[dict[str, str]]:
    """Return the variables of each process: which of how many it is, and its devices."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(shares))}
    return [{**address, "JAX_PROCESS_ID": str(i), **share} for i, share in enumerate(shares)]


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Signals:
    """SIGTERM and Ctrl-C: passed on to the processes."""

    def __init__(self) -> None:
        self.seen = 0
        self.job: Job | None = None
        self._came = threading.Event()

    def note(self, number: int, frame: object) -> None:
        """Take a signal."""
        self.seen = number
        self._came.set()
        if self.job:
            self.job.send(signal.SIGTERM if number == signal.SIGHUP else number)

    def wait(self, seconds: float) -> bool:
        """Wait; return whether a signal has come."""
        return self._came.wait(seconds)


@contextmanager
def passed_on() -> Iterator[Signals]:
    """Pass SIGTERM, SIGHUP and Ctrl-C on instead of dying of them."""
    signals = Signals()
    old = {n: signal.signal(n, signals.note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Job:
    """One try: all processes from start to end."""

    def __init__(self, command: list[str], variables: list[dict[str, str]], signals: Signals):
        self._children: list[Child] = []
        self._signals = signals
        signals.job = self
        for index, own in enumerate(variables):
            env = {**os.environ, **own}
            self._children.append(Child(index, command, env, prefix=f"[{index}] " if index else ""))
        if signals.seen:
            self.send(signals.seen)  # it came while they were started

    def send(self, number: int) -> None:
        """Send a signal to all."""
        for child in self._children:
            child.send(number)

    def run(self) -> tuple[int, str]:
        """Wait until all have ended, and end those that hang; return the exit code and what happened."""
        try:
            first = self._first()
            self._others(first)
        finally:
            self.send(signal.SIGKILL)
            codes = [child.wait() for child in self._children]
            self._signals.job = None
        return _verdict(first, codes)

    def _first(self) -> Child:
        """Wait for the first that ends; of several since the last look, one that was killed made the others end."""
        while True:
            ended = [child for child in self._children if child.code() is not None]
            if ended:
                return min(ended, key=lambda child: (child.code() or 0) >= 0)
            time.sleep(0.05)

    def _others(self, first: Child) -> None:
        """Wait for the others as long as it makes sense: not at all if one was killed."""
        code = first.code() or 0
        end = time.monotonic() + (0.0 if code < 0 else TOGETHER if code not in (0, Stopped.exit_code) else FINISH)
        while time.monotonic() < end and any(child.code() is None for child in self._children):
            if any((child.code() or 0) < 0 for child in self._children):
                break
            time.sleep(0.05)


def _verdict(first: Child, codes: list[int]) -> tuple[int, str]:
    """Return the exit code, the common one if there is, and what happened."""
    code = first.code() or 0
    if code >= 0 and all(other == code for other in codes):
        return code, f"all processes ended with exit code {code}"
    if code == 0:  # the others should have been done as well
        index, code = next((i, c) for i, c in enumerate(codes) if c)
        return 1, f"process {index} {_ended(code)} after others were done"
    return (1 if code < 0 else code), f"process {first.index} {_ended(code)}, so all were ended"


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _say(text: str) -> None:
    print(f"launch.local: {text}", file=sys.stderr, flush=True)


def run(argv: list[str]) -> int:
    """Split the command line at the --, and run."""
    split = argv.index("--") if "--" in argv else len(argv)
    return cli.run(lambda args: main(args, argv[split + 1 :]), FLAGS, __doc__ or "", argv[:split])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
