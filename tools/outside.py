r"""Ask trained networks which inputs are none of their kind, ⵟ runs and baselines side by side.

  python -m tools.outside --runs=runs/a-0,runs/a-1 --baselines=runs/b-0,runs/b-1 --outside=digits:digits --rows=3000

Each run's validation data are inside. Outside are sets made of them (`aether.explain.outside_sets`) and those of
--outside=NAME:PATH, a path as in data.path, images of any classes and any size. What is usual is learned from --usual
training examples, not augmented. Printed is the mean over runs, ± its standard error: AUROC, the share refused by a
threshold that keeps --kept of other validation data, accuracy and calibration error. --out gets a line for each run.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from aether.storage import write_atomic
from launch import cli
from tools.study_tables import markdown, mean_error

SEVERAL = "all sets"


def main(values: flags.FlagValues) -> None:
    """Score every run, write --out, and print the tables."""
    cli.require(values, "runs", "runs/digits")
    others = [cli.named(text, "outside") for text in values.outside]
    records = []
    for group in ("runs", "baselines"):
        for path in filter(None, getattr(values, group).split(",")):
            print(f"{path} ...", file=sys.stderr, flush=True)
            records.append(record(path, others, values) | dict(group=group))
            if values.out:
                lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
                write_atomic(Path(values.out), "".join(lines).encode())
    print(report(records, values.kept, values.layers))


def record(path: str, others: Sequence[tuple[str, str]], values: flags.FlagValues) -> dict[str, Any]:
    """Return what a run's scores are worth, as a line of --out."""
    from flax import nnx

    from aether.evaluate.inputs import as_taken, chosen, foreign
    from aether.evaluate.load import load_run
    from aether.evaluate.run import own_corpus, validation_examples
    from aether.explain.outside import tell
    from aether.explain.outside_sets import made

    run = load_run(path)
    inside, labels = chosen(run, validation_examples(run)[1], values.rows, "the validation data")
    usual, _ = chosen(run, own_corpus(run).train[0].examples, values.usual, "the training data")
    sets = made(inside) | {name: foreign(run, place, values.rows, "--outside") for name, place in others}
    ready = {name: as_taken(run, x) for name, x in sets.items()}
    model = nnx.merge(run.graph, run.params)
    told = tell(model, as_taken(run, inside), ready, labels, usual=as_taken(run, usual), kept=values.kept)
    sizes = {name: len(x) for name, x in {"inside": inside, "usual": usual, **sets}.items()}
    found = {name: getattr(told, name) for name in ("best", "auroc", "thresholds", "refused", "accuracy")}
    found |= dict(accuracy_kept=told.accuracy_kept, calibration_error=told.calibration_error)
    return dict(run=path, kind=run.config.model.kind, step=run.step, inputs=sizes) | found


def report(records: Sequence[dict[str, Any]], kept: float, layers: bool = False) -> str:
    """Return the tables; scores of single layers only if asked for."""
    groups = {g: [r for r in records if r["group"] == g] for g in ("runs", "baselines")}
    groups = {"ⵟ" if g == "runs" else "baseline": part for g, part in groups.items() if part}
    sets = list(records[0]["auroc"])
    parts = ["AUROC", table(groups, sets, "auroc", layers)]
    parts += [f"Share refused where {kept:.0%} are kept", table(groups, ["", *sets], "refused", layers)]
    rows = []
    for name, runs in groups.items():
        for score in ("confidence", runs[0]["best"]):
            after = spread([r["accuracy_kept"][score] for r in runs])
            numbers = [spread([r[key] for r in runs]) for key in ("accuracy", "calibration_error")]
            rows.append([f"{name} ({runs[0]['kind']})", str(len(runs)), *numbers, score, after])
    head = ["", "runs", "accuracy", "calibration error", "score", "accuracy of what it keeps"]
    return "\n\n".join([*parts, markdown(head, rows)])


def table(groups: dict[str, list[dict[str, Any]]], sets: Sequence[str], key: str, layers: bool) -> str:
    """Return a row for each score of each group, a column for each set, and one for their mean."""
    rows = []
    for name, runs in groups.items():
        for score in runs[0]["thresholds"]:
            if layers or ":" not in score:
                each = [[r[key][s][score] for s in sets] for r in runs]
                others = [[r[key][s][score] for s in sets if s] for r in runs]
                means = [sum(numbers) / len(numbers) for numbers in others]
                cells = [spread([numbers[i] for numbers in each]) for i in range(len(sets))]
                rows.append([f"{name} {score}", *cells, spread(means)])
    return markdown(["", *(s or "inside" for s in sets), SEVERAL], rows)


def spread(numbers: Sequence[float | None]) -> str:
    """Write mean ± standard error."""
    known = [x for x in numbers if x is not None]
    if not known:
        return "–"
    mean, error = mean_error(known)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if len(known) > 1 else "")


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags()
    flags.DEFINE_string("runs", "", "folders of ⵟ runs, separated by commas", values)
    flags.DEFINE_string("baselines", "", "folders of baselines on the same data", values)
    flags.DEFINE_multi_string("outside", [], "NAME:PATH of other data; may be given again", values)
    flags.DEFINE_integer("rows", 3000, "examples of each set at most", 6, flag_values=values)
    flags.DEFINE_integer("usual", 5000, "training examples from which to learn what is usual", 1, flag_values=values)
    flags.DEFINE_float("kept", 0.95, "share of the validation data that a threshold keeps", 0.01, 1.0, values)
    flags.DEFINE_bool("layers", False, "print the scores of single layers too", values)
    flags.DEFINE_string("out", "", "a JSON Lines file to write", values)
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
