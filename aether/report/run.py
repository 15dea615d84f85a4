"""Make the report of a run: from its files alone, or with what its network can be taken apart into."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from aether.config import Config, dumps, finite
from aether.errors import AetherError, InputError
from aether.evaluate.load import load_run
from aether.report import records
from aether.report.attribution import attribution
from aether.report.capacity import capacity
from aether.report.features import features
from aether.report.lazy import lazy
from aether.report.outside import outside
from aether.report.page import render
from aether.report.prototypes import first, prototypes
from aether.report.section import Content, Section
from aether.report.subject import Asked, Subject
from aether.workdir import Workdir

REPORT, NUMBERS = "report.html", "explain.json"
PARTS: dict[str, tuple[str, Callable[[Subject], Content]]] = {
    "attribution": ("What made a guess", attribution),
    "first_layer": ("First layer", first),
    "prototypes": ("Prototypes", prototypes),
    "capacity": ("Capacity", capacity),
    "outside": ("Far from the data", outside),
    "lazy": ("Only the nearest prototypes", lazy),
    "features": ("A finite feature map", features),
}


def explain_run(
    workdir: str,
    what: Sequence[str] = (),
    out: str | None = None,
    *,
    step: int | None = None,
    average: str = "auto",
    asked: Asked | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Take the network of a run apart; return step, the path of the report, and what came of each part.

    The report, `report.html`, tells of the run and of these parts; `explain.json` has the numbers, and `explain/` the
    pictures. A part that the network has not got, as a baseline has no prototypes, says so, and the others are done.

    Args:
      workdir: of the run.
      what: names of `PARTS`; by default all that there can be.
      out: folder for these files; by default the run's own.
      step, average: see `load_run`.
      asked: what to look at.
      log: takes lines of progress.

    Raises:
      InputError: there is no such run, part, layer or unit.
      StorageError: `out` cannot be written.
    """
    _check(what, "--what")
    home = Workdir(out or workdir, primary=False, flag="out")
    home.check_writable()
    run = load_run(workdir, step, average=average)
    subject = Subject(run, asked or Asked(), log)
    page = Page(Workdir(workdir, primary=False))
    made = [_part(name, subject) for name in what or PARTS if what or name != "first_layer" or subject.images]
    for section in made:
        for picture in section.pictures:
            home.leave(f"explain/{picture.name}", picture.png)
    about = dict(workdir=workdir, step=run.step, average=run.average, data=subject.asked.data)
    home.leave(NUMBERS, dumps(finite(about | {section.name: section.record() for section in made})).encode())
    looked_at = f"step {run.step:,}" + ("" if run.average == "none" else f", {run.average}")
    looked_at += f", {subject.asked.data}" if subject.asked.data else ""
    path = home.leave(REPORT, page.render(made, {"taken apart": looked_at}))
    return about | dict(report=path, parts={section.name: section.trouble or "done" for section in made})


def _part(name: str, subject: Subject) -> Section:
    began = time.monotonic()
    title, make = PARTS[name]
    try:
        section = Section(name, title, *make(subject))
    except AetherError as e:
        subject.say(f"{name}: {e}")
        return Section(name, title, trouble=str(e))
    subject.say(f"{name}: {time.monotonic() - began:.0f} s")
    return section


def write_report(workdir: str) -> str:
    """Write `report.html` from the files of a run alone; return its path.

    Raises:
      InputError: there is no run.
      StorageError: it cannot be written.
    """
    folder = Workdir(workdir, primary=False)
    return folder.leave(REPORT, Page(folder).render())


def at_the_end(config: Config, workdir: str) -> Callable[[], None]:
    """Return what writes the report when a training has ended, with the parts of `train.explain`.

    A report that fails is told, and ends no run: that is saved already. Of several processes the first one writes, and
    takes no network apart, which no process holds whole.

    Raises:
      InputError: `train.explain` names a part that there is not.
    """
    what = [name.strip() for name in config.train.explain.split(",") if name.strip()]
    _check(what, "train.explain")

    def write() -> None:
        if jax.process_index():
            return
        try:
            _say(f"report: {write_report(workdir)}")
            if what and jax.process_count() > 1:
                _say("train.explain is left out, as this is one of several processes; python -m launch.explain does it")
            elif what:
                explain_run(workdir, what, log=_say)
        except Exception as e:
            _say(f"warning: the report is not what was asked for: {type(e).__name__}: {e}")

    return write


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(what: Sequence[str], key: str) -> None:
    if unknown := [name for name in what if name not in PARTS]:
        raise InputError(f"{key} has {unknown[0]!r}; it takes some of {', '.join(PARTS)}.")


class Page:
    """The page of a run; what its files tell is read at once."""

    def __init__(self, folder: Workdir):
        self.title = Path(folder.path).name
        self.facts, self.told = records.told(folder)

    def render(self, made: Sequence[Section] = (), facts: dict[str, str] | None = None) -> bytes:
        """Return it with further sections, which stand before the config, and further facts."""
        *told, config = self.told
        return render(self.title, self.facts | (facts or {}), [*told, *made, config])
