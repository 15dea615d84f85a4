"""The section about inputs that are far from the data: how well they are told, and whom to answer."""

from aether.evaluate.inputs import as_taken, chosen, foreign
from aether.explain.outside import Told, tell
from aether.explain.outside_sets import made
from aether.report.draw import draw_outside
from aether.report.section import Content, Picture, Table
from aether.report.subject import Subject

IMAGES, TOKENS = 1500, 4096  # of the data: images at least, tokens in a network of 124m
KEPT = 0.95


def outside(subject: Subject) -> Content:
    """Tell what each score is worth at telling the run's kind of data from others, and what abstaining brings."""
    run, count = subject.run, subject.few(TOKENS)
    if subject.images:
        inside, labels = chosen(run, subject.examples[1], max(IMAGES, count))
    else:
        inside, labels = subject.x[:count], None
    sets = made(inside) | {
        name: foreign(run, path, count, "--outside")[:, : inside.shape[1]]
        for name, path in subject.asked.outside.items()
    }
    ready = {name: as_taken(run, x) for name, x in sets.items()}
    told = tell(subject.model, as_taken(run, inside), ready, labels, kept=KEPT)
    text = [
        f"{len(inside)} inputs of the data against {len(sets)} sets that are none. A third of the inside teaches what "
        "is usual, a third chooses the thresholds, the rest is tested. AUROC is the chance that something outside is "
        f"told from something inside, ½ by guessing. The score to take here is {told.best}.",
    ]
    if told.accuracy is not None:
        text.append(
            f"Of the guesses inside {told.accuracy:.2%} are right; calibration error {told.calibration_error:.4f}."
        )
    scores = [name for name in told.scores if ":" not in name]
    items = (
        Table.of(({"score": name} | {s: told.auroc[s][name] for s in sets} for name in scores), "AUROC"),
        Table.of(
            (_abstained(told, name) for name in scores),
            f"Share refused by a threshold that keeps {KEPT:.0%} of other inputs inside, and accuracy of what is kept",
        ),
        Picture(
            "outside.png",
            draw_outside(
                told.scores[told.best], {s: told.outside[s][told.best] for s in sets}, told.thresholds[told.best]
            ),
            f"{told.best} of the inputs inside and of each set; the line is the threshold.",
        ),
    )
    return tuple(text), items


def _abstained(told: Told, name: str) -> dict[str, float | str | None]:
    refused = {s or "inside": share[name] for s, share in told.refused.items()}
    return {"score": name} | refused | {"accuracy kept": told.accuracy_kept[name]}
