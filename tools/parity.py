"""Train a tiny run of each kind of model, export it to each target, and print how far the logits are from Aether's.

python -m tools.parity --kinds=aether,gpt2 --targets=npz,torch
"""

import sys
import tempfile
from pathlib import Path

from absl import flags

from launch import cli

KINDS = "aether,gpt2,minibert,bert,aether_vit,vit,aether_resnet,resnet"
TARGETS = "npz,torch,hf,gpt2,onnx,linen,stablehlo,keras,nmn"  # and tf, where it is installed


def main(values: flags.FlagValues) -> None:
    """Print a table in Markdown: the largest difference of two logits over 64 inputs, for each kind and target.

    Of nmn, the largest relative difference of a layer from its formula in float64; a dash where a target has no place
    for a kind.
    """
    from aether.export.targets import require
    from aether.testing import tiny_run
    from aether.train.loop import train

    kinds, targets = values.kinds.split(","), values.targets.split(",")
    for target in targets:
        require(target)
    rows = [["", *targets], ["---", *("---:" for _ in targets)]]
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            folder = Path(scratch) / kind
            folder.mkdir()
            train(tiny_run(kind, folder), str(folder / "run"))
            rows.append([kind, *(_difference(folder, target) for target in targets)])
            _say("| " + " | ".join(rows[-1]) + " |")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def _difference(folder: Path, target: str) -> str:
    from aether.errors import InputError
    from aether.export.run import export_run

    try:
        found = export_run(str(folder / "run"), target, str(folder / target), log=_say).record()
    except InputError as e:
        _say(str(e))
        return "–"
    return f"{found.get('max_logit_difference', found.get('max_formula_difference')):.1e}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags()
    flags.DEFINE_string("kinds", KINDS, "of models, separated by commas", values)
    flags.DEFINE_string("targets", TARGETS, "frameworks, separated by commas", values)
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
