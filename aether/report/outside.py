"""The section about inputs that are far from the data: how well they are told, and whom to answer."""

from aether.evaluate.inputs import as_taken, chosen, foreign
from aether.explain.outside import Told, tell
from aether.explain.outside_sets import made
from aether.report.draw import draw_outside
from aether.report.section import Content, Picture, Table
from aether.report.subject import Subject

IMAGES, PIXELS = 1500, 1500 * 32**2  # of the data: so many images, but not more pixels; 100 images, or more if asked
TOKENS = 4096  # of texts, in a network of 124m
KEPT = 0.95


def outside(subject: Subject) -> Content:
    """Tell what each score is worth at telling the run's kind of data from others, and what abstaining brings."""
    run, count = subject.run, subject.few(TOKENS)
    if subject.images:
        most = max(count, 100, min(IMAGES, PIXELS // run.config.image.size**2))
        inside, labels = chosen(run, subject.examples[1], most, "the data")
    else:
        inside, labels = subject.some(count), None
    sets = made(inside) | {
        name: foreign(run, path, len(inside), "--outside", subject.length)
        for name, path in subject.asked.outside.items()
    }
    ready = {name: as_taken(run, x) for name, x in sets.items()}
    told = tell(subject.model, as_taken(run, inside), ready, labels, kept=KEPT)
    text = (
        f"{len(inside)} inputs of the data against {len(sets)} sets that are none. A third of the inside teaches what "
        f"is usual, a third chooses the thresholds, {len(told.scores[told.best])} are tested. AUROC is the chance that "
        f"something outside is told from something inside, ½ by guessing. The score to take here is {told.best}.",
    )
    scores = [name for name in told.scores if ":" not in name]
    items = (
        Table.of(({"score": name} | {s: told.auroc[s][name] for s in sets} for name in scores), "AUROC"),
        Table.of(
            (_abstained(told, name) for name in scores),
            f"Share refused by a threshold that keeps {KEPT:.0%} of other inputs inside, and accuracy of what is kept",
        ),
        Table.of([{"accuracy": told.accuracy, "calibration error": told.calibration_error}], "Of the guesses inside"),
        Picture(
            "outside.png",
            draw_outside(
                told.scores[told.best], {s: told.outside[s][told.best] for s in sets}, told.thresholds[told.best]
            ),
            f"{told.best} of the inputs inside and of each set; the line is the threshold.",
        ),
    )
    return text, items


def _abstained(told: Told, name: str) -> dict[str, float | str | None]:
    refused = {s or "inside": share[name] for s, share in told.refused.items()}
    return {"score": name} | refused | {"accuracy kept": told.accuracy_kept[name]}
