"""Tiny Shakespeare by characters: the small setting in which AetherGPT and the GPT-2 baseline are compared.

What:     nanoGPT's setting for a CPU: 4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps, no dropout. The
          first 90 % of the file train, the rest validates. Both models have learned positions, an untied head and
          no biases in linear maps, so that they differ in the ⵟ units and the normalisation alone.
Command:  python -m launch.train --config=configs/shakespeare_char.py --config.data.path=tinyshakespeare.txt
Baseline: the same with --config.model.kind=gpt2 --workdir=runs/shakespeare_gpt2
Data:     1,115,394 characters, the file that nanoGPT and char-rnn use (`tinyshakespeare`, public domain).
Time:     about 2 minutes on two cores.
Result:   nanoGPT publishes a validation loss of 1.88 nats for its setting; ours: see LOG.md.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` is left for the command line."""
    config = default_config()
    config.model.size = "tiny"
    config.model.position = "learned"
    config.model.head = "untied"
    config.model.linear_bias = "no"
    config.model.dropout = 0.0
    config.model.dtype = "float32"
    config.data.path = ""
    config.data.tokenizer = "chars"
    config.data.context = 64
    config.data.batch_size = 12
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip = 1.0
    config.train.steps = 2000
    config.train.loss_chunk = 64
    config.train.eval_every = 500
    config.train.sample_prompt = "ROMEO:"
    config.train.sample_tokens = 200
    return config
