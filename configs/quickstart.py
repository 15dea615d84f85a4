"""Quickstart: AetherGPT learns the source code of the Python standard library, on a laptop and without a network.

What:     4 ⵟ blocks of width 128 without any normalisation layer (the preset `tiny`), on bytes. The text is the
          standard library of the Python that runs this, about 13 MB; one file in ten is held out.
Command:  python -m launch.train --config=configs/quickstart.py
Sample:   python -m launch.generate --workdir=runs/quickstart --prompt="def main("
Time:     about 3 minutes on two cores.
Result:   see LOG.md.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run."""
    config = default_config()
    config.model.size = "tiny"
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.data.path = "python:stdlib"
    config.data.tokenizer = "bytes"
    config.data.context = 128
    config.data.batch_size = 8
    config.train.steps = 1200
    config.train.eval_every = 300
    config.train.eval_batches = 40  # the whole held-out text takes longer than the training between two evaluations
    config.train.sample_prompt = "def main("
    config.train.sample_tokens = 200
    config.checkpoint.every = 300
    return config
