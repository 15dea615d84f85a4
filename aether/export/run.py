"""Export a run: files, their proof and their card, all in one folder or none of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aether import storage
from aether.errors import AetherError, CheckError, retold
from aether.export.card import card_of
from aether.export.parity import Verdict
from aether.export.source import CONFIG, ERROR, NOTES, Asked, Target, load_pairs
from aether.export.targets import require
from aether.storage import filled, new_folder

_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # glibc else keeps freed arrays: a third of a network's size
PARITY, CARD, UNVERIFIED = "parity.json", "README.md", "UNVERIFIED"


def export_run(
    workdir: str,
    target: str,
    out: str,
    *,
    step: int | None = None,
    average: str = "auto",
    dtype: str = "float32",
    data: str | None = None,
    licence: str = "unknown",
    log: Callable[[str], None] = print,
) -> Verdict:
    """Write a checkpoint for another framework, run it there, and compare it with Aether; return how near it is.

    The folder appears when all is done. Where the logits differ by more than `parity.BOUND`, it is left to be looked
    at, with a file UNVERIFIED in it. The parts run one after the other, on the CPU, in processes of their own: this one
    does not need JAX, and whatever holds the accelerator may go on.

    Args:
      workdir: of the run.
      target: one of `aether.export.targets.NAMES`.
      out: a folder that is not there yet, or is empty.
      step: of the checkpoint; the last by default.
      average: which parameters, see `aether.evaluate.load.load_run`.
      dtype: of what is written, float32 or bfloat16; both sides then compute in float32 with the rounded parameters.
      data: what they are compared on, as in `aether.evaluate.run.evaluate_run`.
      licence: for the card, as model hubs name it.
      log: takes a line about what is going on.

    Raises:
      InputError: no such run, target or data, a package is missing, or `out` has something in it.
      CheckError: the logits differ, or the export does not run.
      StorageError: `out` cannot be written.
    """
    to, folder = require(target), new_folder(out, "out")
    with filled(folder) as made:
        work = made.with_name("work")
        work.mkdir()
        Asked(workdir, step, average, dtype, data, licence, out).save(work)
        child("write", to, target, made, work, log)
        if to.finish is not None:
            child("finish", to, target, made, work)
        log(f"{target} on the same")
        child("replay", to, target, made, work)
        parity = to.compare(made, load_pairs(work))
        (made / PARITY).write_text(json.dumps(parity.record(), indent=2) + "\n", encoding="utf-8")
        config = json.loads((made / CONFIG).read_text(encoding="utf-8"))
        notes = (made / NOTES).read_text(encoding="utf-8") if (made / NOTES).exists() else ""
        card = card_of(config["network"], config["aether"], to, target, parity, notes)
        (made / CARD).write_text(card, encoding="utf-8")
        if not parity.holds:
            (made / UNVERIFIED).write_text(parity.verdict(target) + "\n", encoding="utf-8")
    if not parity.holds:
        raise CheckError(f"{parity.verdict(target)} The files in {out} are marked {UNVERIFIED}.")
    return parity


def child(part: str, to: Target, target: str, made: Path, work: Path, log: Callable[[str], None] | None = None) -> None:
    """Run a part of an export in a process of its own; `log` takes what it prints."""
    command = [sys.executable, "-m", "aether.export.child", part, target, str(made), str(work)]
    where = {**os.environ, **_GIVE_BACK, **(dict(JAX_PLATFORMS="cpu") if part == "write" else to.environment)}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=where, stderr=errors, **pipes) as process,
    ):
        try:
            for line in process.stdout or ():
                if log is not None:
                    log(line.rstrip("\n"))
            process.wait()
        except BaseException:
            process.kill()  # before its folders go
            raise
        if process.returncode:
            errors.seek(0)
            said = errors.read()
            raise _told(target, work, process.returncode, said) from RuntimeError(f"it said:\n{said}")


def _told(target: str, work: Path, code: int, said: str) -> AetherError:
    """Return the error of a child that ended like this."""
    if code < 0:
        return CheckError(
            f"The {target} export was killed ({signal.Signals(-code).name}), perhaps since memory ran out."
        )
    file = work / ERROR
    if not file.exists():
        return CheckError(f"The {target} export does not run: {(said.strip() or 'it said nothing').splitlines()[-1]}")
    error = json.loads(file.read_text(encoding="utf-8"))
    return retold(**error) or CheckError(f"The {target} export does not run: {storage.one_line(error['text'])}")
