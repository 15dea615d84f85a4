"""The faults of the soak: each hits a run, waits until it goes on by itself or by the next start, and says how."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.soak_run import Broken, Training

STOPPED, STORAGE = 75, 74  # exit codes


@dataclass
class Outcome:
    """What a fault did: the step it hit, the one that the run went on from, the seconds until then, and words."""

    fault: str
    step: int
    resumed: int
    seconds: float
    words: str


class Faults:
    """Hits a run.

    Args:
      run: the run.
      disk: the mounted file system that it lies on, None if there is none.
      choose: what draws processes and moments.
    """

    def __init__(self, run: Training, disk: Path | None, choose: random.Random):
        self.run, self._disk, self._choose = run, disk, choose

    def __call__(self, fault: str, count: int) -> Outcome:
        """Hit the run, have `count` processes go on, and return the outcome.

        Raises:
          Broken: it does not go on, or not from where it must.
        """
        time.sleep(self._choose.uniform(0, 0.2))
        begin, mark, step = time.monotonic(), self.run.mark(), self.run.step()
        hit: Callable[[int], str] = getattr(self, f"_{fault}")
        words = hit(count)
        self.run.until(lambda: self._goes_on(count, mark), "going on")
        resumed = self.run.resumed(mark)
        return Outcome(fault, step, resumed or 0, time.monotonic() - begin, words)

    def _goes_on(self, count: int, mark: int) -> bool:
        """Return whether steps are made again; a launcher that has given up is followed by another."""
        code = self.run.code()
        if code in (STOPPED, STORAGE):
            self.run.start(count)
        elif code is not None and code != 0:
            raise Broken(f"the launcher ended with exit code {code}:\n{self.run.said(20)}")
        return code == 0 or self.run.resumed(mark) is not None

    def _process(self) -> int:
        return self._choose.randrange(self.run.count)

    def _stop(self, process: int | None) -> int:
        """Stop the run politely and return the step that all have saved."""
        mark = self.run.mark()
        self.run.send(signal.SIGTERM, process)
        code = self.run.wait()
        if code != STOPPED or f"saved at step {self.run.step()} of" not in self.run.since(mark):
            raise Broken(f"after SIGTERM the launcher ended with exit code {code}, not 75:\n{self.run.said(20)}")
        if self.run.saved()[-1] != self.run.step():
            raise Broken(f"stopped after step {self.run.step()}, but the last checkpoint is {self.run.saved()[-1]}")
        return self.run.step()

    def _again(self, count: int, expected: int) -> None:
        """Start `count` processes and see that they go on from a step."""
        mark = self.run.mark()
        self.run.start(count)
        self.run.until(lambda: self.run.resumed(mark) is not None or self.run.code() is not None, "going on")
        if self.run.resumed(mark) not in (expected, None):
            raise Broken(f"it went on from step {self.run.resumed(mark)}, not {expected}:\n{self.run.said(20)}")

    def _lost(self, number: int) -> str:
        """Hit one process with a signal that it cannot catch; the launcher starts all again."""
        process, mark = self._process(), self.run.mark()
        pids, saved = self.run.pids(), self.run.saved()
        self.run.send(number, process)
        self.run.until(lambda: self.run.resumed(mark) is not None or self.run.code() is not None, "a restart")
        resumed = self.run.resumed(mark)
        if saved and resumed is not None and resumed < saved[-1]:
            raise Broken(f"it went on from step {resumed}, though {saved[-1]} was saved:\n{self.run.said(20)}")
        if left := [pid for pid in pids.values() if os.path.exists(f"/proc/{pid}")]:
            raise Broken(f"processes {left} of the try before are still there")
        return f"process {process} of {len(pids)}"

    def _sigkill(self, count: int) -> str:
        return self._lost(signal.SIGKILL)

    def _sigstop(self, count: int) -> str:
        return self._lost(signal.SIGSTOP)

    def _sigterm(self, count: int) -> str:
        process = self._process()
        self._again(count, self._stop(process))
        return f"process {process} of {self.run.count}; all saved and ended with exit code 75"

    def _count(self, count: int) -> str:
        before = self.run.count
        self._again(count, self._stop(None))
        return f"{before} processes, then {count}"

    def _damage(self, count: int) -> str:
        """Stop the run, spoil its newest checkpoint, and go on: from the one before."""
        self._stop(None)
        *_, before, newest = [0, 0, *self.run.saved()]
        if not before:
            self._again(count, newest)
            return f"not done: {newest} is the only checkpoint"
        words = spoil(self.run.folder / "checkpoints" / str(newest), self._choose)
        mark = self.run.mark()
        self._again(count, before)
        if f"Checkpoint {newest} in " not in self.run.since(mark) or "is damaged" not in self.run.since(mark):
            raise Broken(f"the damaged checkpoint {newest} was not named:\n{self.run.said(20)}")
        shutil.rmtree(self.run.folder / "checkpoints" / f"damaged-{newest}")
        return f"checkpoint {newest}: {words}"

    def _full(self, count: int) -> str:
        """Fill the disk until the run ends for want of space, then free it; what was saved is as it was."""
        assert self._disk is not None
        ballast, mark = self._disk / "ballast", self.run.mark()
        room = self._choose.choice([0, 64 << 10])  # nothing fits, or lines of metrics do
        fill(ballast, room)
        told = ("No space is left", "disk full", "No space left")
        try:
            self.run.until(lambda: any(t in self.run.since(mark) for t in told), "a word about the full disk")
            saved = self.run.saved()
            self.run.until(lambda: self.run.code() is not None or "restart" in self.run.since(mark), "its end")
        finally:
            ballast.unlink()
        if self.run.saved()[-1:] < saved[-1:]:
            raise Broken(f"checkpoint {saved[-1]} is gone")
        return f"{room >> 10} KiB left"


def spoil(checkpoint: Path, choose: random.Random) -> str:
    """Flip, truncate or delete a file of a checkpoint, and say which."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)
    file, how = choose.choice(files), choose.choice(["flipped", "truncated", "deleted"])
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        file.write_bytes(data)
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    return f"{how} {file.relative_to(checkpoint)}"


def fill(ballast: Path, room: int) -> None:
    """Fill the disk but for some bytes."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    os.truncate(ballast, max(0, ballast.stat().st_size - room))


def mount(folder: Path, megabytes: int) -> bool:
    """Mount a small file system in memory; False where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def unmount(folder: Path) -> None:
    """Undo `mount`."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
