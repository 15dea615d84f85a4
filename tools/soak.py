"""Train while everything goes wrong, and compare with a run in which nothing did.

  python -m tools.soak --minutes=10

`launch.local` trains a tiny model with 2 processes: once undisturbed, and once under SIGTERM, SIGKILL and SIGSTOP to
random processes, damaged newest checkpoints and a full disk. Parameters, optimizer and the metrics of every step must
be equal bit by bit. A third run changes its number of processes (2, 1, 4) besides; its losses must agree to 1e-5.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags

from aether.errors import CheckError
from launch import cli
from tools import soak_faults
from tools.soak_faults import Faults, Outcome
from tools.soak_run import CONFIG, Broken, Training

FLAGS = cli.new_flags()
flags.DEFINE_float("minutes", 10.0, "how long, about; at least 20 faults in 10 minutes", 0.5, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the model, the text, and what goes wrong when", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_string(
    "out", "", "folder for the runs and their logs (empty: a temporary one, deleted)", flag_values=FLAGS
)

CONSTANT = ("sigterm", "sigkill", "sigstop", "damage", "full")
COUNTS = (1, 4, 2)  # of processes, one after the other
EVERY = 10  # steps between checkpoints
SECONDS = 24.0  # for a fault, by experience on two cores
ROUGH = {"tokens_per_second", "mfu", "data_wait"}  # metrics that are times
CLOSE = 1e-5  # relative difference of losses where the number of processes changed


def main(args: flags.FlagValues) -> None:
    """Run all three, and compare."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)

    with place(args.out) as out:
        outcomes, complaints = soak(out, args.minutes, random.Random(args.seed), args.seed, say)
        print(table(outcomes))
        if complaints:
            raise CheckError(f"{len(complaints)} things are wrong: {'; '.join(complaints)} (logs in {out}).")
        say(f"{len(outcomes)} faults, and nothing is lost")


def soak(out: Path, minutes: float, choose: random.Random, seed: int, say: Any) -> tuple[list[Outcome], list[str]]:
    """Make the runs; return what the faults did, and what is wrong."""
    disk = out / "disk"
    mounted = soak_faults.mount(disk, 32)
    if not mounted:
        say("no file system can be mounted here, so the disk is never full")
    running: list[Training] = []
    try:
        number = max(4, round((60 * minutes - 30) / SECONDS))
        kinds = [k for k in CONSTANT if mounted or k != "full"]
        first = plan(kinds, number - number // 3, choose)
        second = plan(["count", "count", "sigkill"], number // 3, choose)
        steps = max(sum(far + EVERY for _, far in part) for part in (first, second)) + 60
        config, environment = write_inputs(out, seed)
        say(f"{number} faults in runs of {steps} steps")
        outcomes, complaints = [], []
        for name, faults in (("undisturbed", []), ("constant", first), ("changing", second)):
            run = Training(disk / name, config, steps, out / f"{name}.log", environment)
            running.append(run)
            try:
                outcomes += hit(
                    run, faults, disk if mounted else None, choose, lambda text, n=name: say(f"{n}: {text}")
                )
            except Broken as e:
                complaints.append(f"{name}: {e}")
                say(f"{name}: {e}")
                run.kill()
        return outcomes, complaints or compared(disk)
    finally:
        for run in running:
            run.kill()
        if mounted:
            soak_faults.unmount(disk)


def plan(kinds: list[str], number: int, choose: random.Random) -> list[tuple[str, int]]:
    """Return faults, each with the steps made before it: every kind as often as the others."""
    drawn = [kinds[i % len(kinds)] for i in range(number)]
    choose.shuffle(drawn)
    return [(kind, choose.randint(3, 2 * EVERY)) for kind in drawn]


def hit(
    run: Training, faults: list[tuple[str, int]], disk: Path | None, choose: random.Random, say: Any
) -> list[Outcome]:
    """Train to the end under these faults."""
    outcomes, counts = [], 0
    inject = Faults(run, disk, choose)
    run.start(2)
    run.until(lambda: len(run.saved()) > 1 or run.code() is not None, "a checkpoint to go back to")
    at = run.step()
    for fault, far in faults:
        if not run.passes(at + far):
            break
        count = run.count
        if fault == "count":
            count, counts = COUNTS[counts % len(COUNTS)], counts + 1
        outcome = inject(fault, count)
        outcomes.append(outcome)
        at = outcome.resumed
        say(f"{fault} at step {outcome.step}, going on from {at} after {outcome.seconds:.1f} s ({outcome.words})")
    code = run.finish()
    if code:
        raise Broken(f"it ended with exit code {code}:\n{run.said(20)}")
    say(f"ended at step {run.step()} of {run.steps}")
    return outcomes


def result(folder: Path) -> tuple[dict[tuple[int, str], dict[str, Any]], dict[str, Any]]:
    """Return the lines of metrics.jsonl by (step, split), times aside, and the arrays of the last checkpoint.

    Raises:
      Broken: a line stands there twice, or one is missing.
    """
    import numpy as np

    from aether.checkpoint import Checkpoints
    from aether.config import CheckpointConfig

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = {(r["step"], r["split"]): {k: v for k, v in r.items() if k not in ROUGH} for r in records}
    checkpoints = Checkpoints(str(folder / "checkpoints"), CheckpointConfig())
    last = checkpoints.latest() or 0
    if len(lines) != len(records) or [step for step, split in lines if split == "train"] != list(range(1, last + 1)):
        raise Broken(f"metrics.jsonl has {len(records)} lines that are not those of steps 1 to {last} in order")
    saved = json.loads((folder / "checkpoints" / str(last) / "meta.json").read_text())["arrays"]
    like = {name: np.zeros(entry["shape"], entry["dtype"]) for name, entry in saved.items()}
    return lines, checkpoints.restore(like)[0]


def compared(disk: Path) -> list[str]:
    """Return what differs between the runs, which have all ended."""
    try:
        plain, constant, changing = (result(disk / name) for name in ("undisturbed", "constant", "changing"))
    except Broken as e:
        return [str(e)]
    return differences(plain, constant, 0.0, "constant") + differences(plain, changing, CLOSE, "changing")


def differences(one: Any, other: Any, close: float, name: str) -> list[str]:
    """Return what differs between two results: anything at all, or with `close` losses by more than that."""
    found = []
    if one[0].keys() != other[0].keys():
        found.append(f"{name} has metrics of {sorted(one[0].keys() ^ other[0].keys())[:5]} that the other one has not")
    for key in sorted(one[0].keys() & other[0].keys()):
        mine, theirs = one[0][key], other[0][key]
        if (mine != theirs) if not close else abs(mine["loss"] - theirs["loss"]) > close * abs(mine["loss"]):
            found.append(f"{name} has {theirs} at {key}, not {mine}")
            break
    if not close:
        unequal = [k for k in one[1].keys() | other[1].keys() if not _same(one[1].get(k), other[1].get(k))]
        found += [f"{name} ends with another {', '.join(sorted(unequal)[:5])}"] if unequal else []
    return found


def _same(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.tobytes() == other.tobytes()


def write_inputs(out: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """Write the texts and the config; return that and the environment of the launchers."""
    choose = random.Random(seed)
    words = "the model reads a line and says what comes next if it can".split()
    for name, count in (("text", 200), ("own", 5)):
        (out / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (out / name / f"{i}.txt").write_text(" ".join(choose.choices(words, k=choose.randint(3, 60))) + "\n")
    config = out / "soak.py"
    paths = dict(text=str(out / "text"), own=str(out / "own"), cache=str(out / "cache"))
    config.write_text(CONFIG.format(**paths, seed=seed, every=EVERY))
    return config, {**os.environ, "AETHER_CACHE": str(out / "cache"), "JAX_PLATFORMS": "cpu"}


def table(outcomes: list[Outcome]) -> str:
    """Return a table of the faults by kind."""
    rows = [f"{'fault':<10}{'times':>6}{'steps redone':>14}{'seconds until it went on':>26}"]
    for kind in sorted({o.fault for o in outcomes}):
        these = [o for o in outcomes if o.fault == kind]
        redone = sum(max(0, o.step - o.resumed) for o in these)
        times = [o.seconds for o in these]
        rows.append(f"{kind:<10}{len(these):>6}{redone:>14}{statistics.median(times):>14.1f} (most {max(times):.1f})")
    return "\n".join(rows)


@contextmanager
def place(out: str) -> Iterator[Path]:
    """Yield a folder for everything, deleted afterwards unless the user named it; signals end it in order."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            yield Path(out).absolute()
        else:
            with tempfile.TemporaryDirectory(prefix="aether-soak-") as folder:
                yield Path(folder)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
