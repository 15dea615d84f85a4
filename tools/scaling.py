r"""Fit loss against parameters and tokens to the whole runs of a study, and say what that predicts elsewhere.

  python -m tools.study --config=... --vary=model.kind=gpt2,aether --vary=model.width=64,128,256,512 \
      --vary=train.steps=500,1000,2000 --sweep=... --out=runs/scaling
  python -m tools.scaling --study=runs/scaling --at=124m:162e6:2.5e9 --png=scaling.png

For each value of the first --vary (or each of --cases), or with --by=KEY for each value of that key, the law
L = E + A/N^a + B/D^b (Hoffmann et al., 2022, arXiv 2203.15556), N parameters and D tokens or images seen, by least
squares of log L with Huber's loss. Intervals are of 90 %, from fits to runs drawn anew with replacement, the same for
all groups, so that differences are paired. They say how well the runs determine the law, not whether it holds where
nothing was measured. --study may be given again, for parts of a grid that were studied apart.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from aether.errors import InputError
from aether.figures import new_figure, plain, png
from aether.storage import write_atomic
from launch import cli, overrides
from tools.study_plan import Combination, Study, read_plan, read_results
from tools.study_tables import markdown

HUBER = 1e-3  # of log L, as in the source
INTERVAL = (5, 95)
Table = tuple[list[str], list[list[str]]]


class Run(NamedTuple):
    """What the fit takes from a run: its place in the grid, parameters N, tokens or images D, and loss."""

    place: tuple
    n: float
    d: float
    loss: float


class Law(NamedTuple):
    """L = E + A/N^a + B/D^b."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, n: Any, d: Any) -> Any:
        """Return the loss."""
        return self.e + self.a * n**-self.alpha + self.b * d**-self.beta


def main(args: flags.FlagValues) -> None:
    """Fit, and print what was found."""
    folders = [Path(folder) for folder in cli.require(args, "study", "runs/scaling")]
    points = [target(text) for text in args.at]
    groups = runs_of(folders, args.by)
    laws = {name: fit(runs) for name, runs in groups.items()}
    drawn = bootstrap(groups, laws, args.draws, np.random.default_rng(0))
    print(markdown(*law_table(groups, laws, drawn)))
    if points:
        print("\n" + markdown(*prediction_table(laws, drawn, points)))
    if args.png:
        write_atomic(Path(args.png), picture(groups, laws))


def target(text: str) -> tuple[str, float, float]:
    """Return name, parameters and tokens of an --at."""
    parts = text.split(":")
    try:
        name, n, d = parts[0], *(float(part) for part in parts[1:])
    except ValueError:
        name, n, d = "", 0.0, 0.0
    if not (name and n > 0 and d > 0):
        raise InputError(f"--at is {text!r}; write NAME:PARAMETERS:TOKENS, as in 124m:162e6:2.5e9.")
    return name, n, d


def runs_of(folders: Sequence[Path], key: str = "") -> dict[str, list[Run]]:
    """Return the whole runs of studies by group: what the first --vary or --cases chose, or the choice for `key`.

    Raises:
      InputError: a group has too few of them, or of too few sizes or lengths, for five numbers; or no study has `key`.
    """
    groups: dict[str, list[Run]] = {}
    for folder in folders:
        study, results = read_plan(folder, "study"), read_results(folder)
        for c in study.combinations:
            per_step = overrides.make_config(study.config, [*study.overrides, *c.overrides]).per_step
            group, place = c.group, c.label.removeprefix(c.group)
            if key:
                group = f"{key.split('.', 1)[-1]}={chosen(c, study, key)}"
                place = ",".join(word for word in c.label.split(",") if word != group)
            for job in study.full(c, results):
                record = results.get(job.name)
                if record and record["status"] == "done":
                    run = Run((place, job.seed), record["parameters"], per_step * job.steps, record["loss"])
                    groups.setdefault(group, []).append(run)
    for name, runs in groups.items():
        sizes, lengths = len({run.n for run in runs}), len({run.d for run in runs})
        if sizes < 3 or lengths < 2 or len(runs) < 6:
            raise InputError(
                f"{', '.join(map(str, folders))}: there are {len(runs)} whole runs of {name}, of {sizes} sizes and "
                f"{lengths} lengths; the law needs six, of three sizes and two lengths at least."
            )
    if not groups:
        raise InputError(f"{', '.join(map(str, folders))}: no whole run ended well; let the study go on.")
    return groups


def chosen(c: Combination, study: Study, key: str) -> str:
    """Return what a combination, or its whole study, sets a key to."""
    for override in reversed([*study.overrides, *c.overrides]):
        name, _, text = override.partition("=")
        if name == key:
            return text
    raise InputError(f"--by is {key}, which {c.label} does not set; name a key of --vary, such as model.kind.")


def fit(runs: Sequence[Run], start: Law | None = None) -> Law:
    """Return the law that fits best: from many starts, or from one."""
    from scipy.optimize import least_squares

    n, d, loss = (np.array([getattr(run, name) for run in runs], float) for name in ("n", "d", "loss"))
    scale_n, scale_d = (math.exp(np.mean(np.log(v))) for v in (n, d))  # so that exponents and factors part

    def residual(p: np.ndarray) -> np.ndarray:
        terms = np.exp([np.full_like(n, p[0]), p[1] - p[2] * np.log(n / scale_n), p[3] - p[4] * np.log(d / scale_d)])
        return np.log(terms.sum(0)) - np.log(loss)

    low, high = [-6.0, -12.0, 0.0, -12.0, 0.0], [4.0, 4.0, 3.0, 4.0, 3.0]
    starts = [tuple(s) for s in _starts(loss)] if start is None else [_logs(start, scale_n, scale_d)]
    found = [
        least_squares(residual, np.clip(s, low, high), bounds=(low, high), loss="huber", f_scale=HUBER) for s in starts
    ]
    e, a, alpha, b, beta = min(found, key=lambda f: f.cost).x
    return Law(math.exp(e), math.exp(a) * scale_n**alpha, float(alpha), math.exp(b) * scale_d**beta, float(beta))


def _starts(loss: np.ndarray) -> list[tuple[float, ...]]:
    level = math.log(float(np.min(loss)))
    shares, exponents = (-0.1, -0.7), (0.2, 0.7)
    return [
        (level + e, level + a, alpha, level + a, beta)
        for e, a, alpha, beta in itertools.product(shares, (-2.0, -4.0), exponents, exponents)
    ]


def _logs(law: Law, scale_n: float, scale_d: float) -> tuple[float, ...]:
    a = math.log(max(law.a, 1e-300)) - law.alpha * math.log(scale_n)
    b = math.log(max(law.b, 1e-300)) - law.beta * math.log(scale_d)
    return math.log(max(law.e, 1e-300)), a, law.alpha, b, law.beta


def bootstrap(
    groups: dict[str, list[Run]], laws: dict[str, Law], draws: int, rng: np.random.Generator
) -> list[dict[str, Law]]:
    """Return laws of runs drawn anew, the same places of every group in each draw; the fits start from `laws`."""
    places = sorted({run.place for runs in groups.values() for run in runs})
    found: list[dict[str, Law]] = []
    while len(found) < draws:
        picked = [places[i] for i in rng.integers(0, len(places), len(places))]
        drawn = {name: [run for place in picked for run in runs if run.place == place] for name, runs in groups.items()}
        if all(len({run.n for run in runs}) > 1 and len({run.d for run in runs}) > 1 for runs in drawn.values()):
            found.append({name: fit(runs, laws[name]) for name, runs in drawn.items()})
    return found


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Write the interval of 90 %."""
    low, high = np.percentile(values, INTERVAL)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def law_table(groups: dict[str, list[Run]], laws: dict[str, Law], drawn: list[dict[str, Law]]) -> Table:
    """Return a row for each group: the law, how far its runs are from it, and the intervals of its exponents."""
    rows = []
    for name, law in laws.items():
        runs = groups[name]
        off = [run.loss - law(run.n, run.d) for run in runs]
        numbers = [f"{law.e:.3f}", f"{law.a:.3g}", f"{law.alpha:.3f}", f"{law.b:.3g}", f"{law.beta:.3f}"]
        spans = [interval([d[name].alpha for d in drawn]), interval([d[name].beta for d in drawn])]
        rows.append([name, str(len(runs)), *numbers, *spans, f"{np.sqrt(np.mean(np.square(off))):.4f}"])
    return ["", "runs", "E", "A", "a", "B", "b", "a, 90 %", "b, 90 %", "off by (rms)"], rows


def prediction_table(
    laws: dict[str, Law], drawn: list[dict[str, Law]], points: Sequence[tuple[str, float, float]]
) -> Table:
    """Return a row for each point: each group's loss, and the difference of every other group to the first."""
    first, *others = laws
    head = ["", "parameters", "tokens", *laws, *(f"{name} − {first}" for name in others)]
    rows = []
    for name, n, d in points:
        cells = [f"{law(n, d):.3f} ({interval([f[group](n, d) for f in drawn])})" for group, law in laws.items()]
        for other in others:
            difference = [f[other](n, d) - f[first](n, d) for f in drawn]
            cells.append(f"{laws[other](n, d) - laws[first](n, d):+.3f} ({interval(difference)})")
        rows.append([name, f"{n:.3g}", f"{d:.3g}", *cells])
    return head, rows


def picture(groups: dict[str, list[Run]], laws: dict[str, Law]) -> bytes:
    """Draw losses over tokens, a panel for each group and a color for each size, the law as lines."""
    import matplotlib

    figure = new_figure(5.5 * len(groups), 4.5, dpi=150)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, (name, runs) in zip(axes, groups.items(), strict=True):
        sizes = sorted({run.n for run in runs})
        colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(sizes)))
        d = np.geomspace(min(run.d for run in runs), max(run.d for run in runs), 50)
        for n, color in zip(sizes, colors, strict=True):
            own = [run for run in runs if run.n == n]
            axis.plot([run.d for run in own], [run.loss for run in own], "o", ms=4, color=color)
            axis.plot(d, laws[name](n, d), "-", lw=1, color=color, label=f"{n / 1e6:.2f} M")
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("tokens or images seen")
        plain(axis)
        axis.legend(title="parameters", frameon=False)
    axes[0].set_ylabel("validation loss (nats)")
    return png(figure)


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags(config=False)
    flags.DEFINE_multi_string("study", [], "folder of a study whose whole runs differ in size and length", values)
    flags.DEFINE_string("by", "", "key whose values are compared (empty: the study's first --vary, or --cases)", values)
    flags.DEFINE_multi_string("at", [], "NAME:PARAMETERS:TOKENS to predict the loss at; may be given again", values)
    flags.DEFINE_integer("draws", 200, "fits to runs drawn anew, for the intervals", 20, None, values)
    flags.DEFINE_string("png", "", "file for the picture", values)
    return values


FLAGS = define()

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
