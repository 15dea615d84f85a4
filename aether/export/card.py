"""The card of an export: what the network is, what it was trained on, how good it is, and how it was checked."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aether.export.parity import Verdict
from aether.export.source import Target
from aether.train.metrics import METRICS, read
from aether.workdir import Workdir

if TYPE_CHECKING:
    from aether.evaluate.load import Run

_TAGS = {"lm": "text-generation", "mlm": "fill-mask", "classify": "image-classification"}
_AVERAGES = {"none": "no: as trained", "ema": "the moving average over training"}
_DOES = {"lm": "continues text", "mlm": "fills in masked text", "classify": "tells images apart"}


def record_of(run: "Run", dtype: str, parameters: int, licence: str) -> dict[str, Any]:
    """Return what config.json of an export says of its run.

    The run's whole config, step, dtype, licence, git revision and versions; `parameters`, how many; `seen`, tokens or
    images; `results`, the last scores of each validation set up to the step.
    """
    folder = Workdir(run.workdir, primary=False)
    began = folder.read_json("config.json")
    return dict(
        config=run.config.to_json(),
        step=run.step,
        average=run.average,
        dtype=dtype,
        license=licence,
        parameters=parameters,
        seen={run.config.unit: run.step * run.config.per_step},
        results=_results(folder, run),
        **{k: began.get(k) for k in ("data_fingerprint", "versions", "git")},
    )


def _results(folder: Workdir, run: "Run") -> dict[str, dict[str, Any]]:
    """Return the scores of these parameters: those that training found, if it scored the same average, and of tasks."""
    found: dict[str, dict[str, Any]] = {}
    scored = run.average == ("ema" if run.config.train.ema else "none")
    for scores in read(folder.local / METRICS) if scored else ():
        if scores["split"] != "train" and scores["step"] <= run.step:
            found[scores["split"]] = {k: v for k, v in scores.items() if k != "split"}
    for file in sorted((folder.local / "evaluation").glob(f"*-{run.step}.json")):
        scores = json.loads(file.read_bytes())
        if scores.get("average") == run.average:
            kept = {k: v for k, v in scores.items() if not k.endswith("_stderr")}
            found[file.stem.removesuffix(f"-{run.step}")] = kept
    return found


def card_of(
    facts: dict[str, Any], record: dict[str, Any], to: Target, target: str, parity: Verdict, notes: str = ""
) -> str:
    """Return README.md: front matter as model hubs read it, then what a person wants to know."""
    model, data = record["config"]["model"], record["config"]["data"]
    task = "classify" if "classes" in facts else "lm" if facts["causal"] else "mlm"
    front = dict(license=record["license"], pipeline_tag=_TAGS[task], tags=["aether", "yat", model["kind"]])
    unit, seen = next(iter(record["seen"].items()))
    trained_on = ", ".join(data["mixture"].values()) or data["path"]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# {model['kind']}, {record['parameters'] / 1e6:.3g} million parameters",
        "",
        f"A network that {_DOES[task]}, trained by Aether and exported as {to.what}.",
        "",
    ]
    if not parity.holds:
        lines += ["**UNVERIFIED: this export does not compute what Aether computes. Do not use it.**", ""]
    lines += _table(
        ("", ""),
        [
            ("network", _shape(facts)),
            ("trained on", f"{trained_on}: {seen:,} {unit} in {record['step']:,} steps"),
            ("parameters", f"{record['parameters']:,} in {record['dtype']}"),
            ("averaged", _AVERAGES.get(record["average"], f"the mean of checkpoints, {record['average']}")),
            ("licence", record["license"]),
        ],
    )
    lines += ["", "## Results", ""]
    scores = [
        (name if found["step"] == record["step"] else f"{name}, step {found['step']:,}", k, f"{v:.4g}")
        for name, found in record["results"].items()
        for k, v in _numbers(found)
    ]
    lines += _table(("data", "score", ""), scores) if scores else ["The run was not evaluated."]
    what, rows = parity.checked()
    lines += [
        "",
        "## Checked",
        "",
        what,
        "",
        *_table(("", "measured", "allowed"), rows),
        "",
        "## Use",
        "",
        *((_input(facts, to), "") if "inputs" in to.use else ()),
        "```python",
        to.use,
        "```",
        "",
        *([notes.strip(), ""] if notes else []),
        f"`config.json` has the facts of the network under `network`, and the run's own config under `aether`. Made by "
        f"`python -m launch.export --to={target}`.",
    ]
    return "\n".join(lines) + "\n"


def _shape(facts: dict[str, Any]) -> str:
    if facts["family"] == "resnet":
        return f"ResNet, blocks {facts['stages']}, width {facts['width']}, {facts['units']} units"
    sizes = f"{facts['layers']} layers, {facts['heads']} heads, width {facts['width']}"
    return f"{sizes}, {facts['attention']} attention, {facts['mlp']} MLP, normalisation: {facts['norm']}"


def _input(facts: dict[str, Any], to: Target) -> str:
    if "classes" not in facts:
        return f"`inputs` are ids (rows, length), up to {facts['context']} a row."
    side, channels = facts["image_size"], facts["channels"]
    shape = (channels, side, side) if to.channels_first else (side, side, channels)
    return (
        f"`inputs` are images (rows, {', '.join(map(str, shape))}), "
        f"(pixels / 255 − {facts['mean']:.6g}) / {facts['std']:.6g}; `classes.json` names the classes."
    )


def _numbers(scores: dict[str, Any]) -> list[tuple[str, float]]:
    return [(k, v) for k, v in scores.items() if isinstance(v, float)]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
