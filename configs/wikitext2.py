"""WikiText-2 in a small BPE vocabulary, on which AetherGPT and the GPT-2 baseline are compared at 3 and 10 million.

What:     4 layers, 4 heads, width 128 on 8192 pieces (2.9 million parameters), context 128, 1200 steps of 1024 tokens,
          less than one pass over WikiText-2. Both models have rotary positions, an untied head and no biases in linear
          maps, so that they differ in the ⵟ units and the normalisation alone.
Tokenizer: python tools/train_tokenizer.py --path=wikitext-2/train.txt --out=wikitext.model --vocab_size=8192
Command:  python -m launch.train --config=configs/wikitext2.py --config.data.path=wikitext-2/train.txt \
              --config.data.validation.valid=wikitext-2/valid.txt --config.data.tokenizer=wikitext.model
Baseline: the same with --config.model.kind=gpt2 --workdir=runs/wikitext2_gpt2; a fair one has rates of its own for
          table and head (configs/studies/tables.toml): --config.optim.lr_scale.embedding=30
          --config.optim.lr_scale.head=3 '--config.optim.no_decay=bias|alpha|epsilon|scale|embedding'
Larger:   the same with --config.model.layers=8 --config.model.heads=8 --config.model.width=256 (10.5 million); the
          baseline then with --config.optim.learning_rate=1.5e-3 and embedding=60 (configs/studies/two_sizes_gpt2.toml)
Data:     any text; WikiText-2 has 2 million words.
Time:     about 5 minutes on one core.
Result:   4.26 nats a token after 1200 steps at a learning rate of 1.2e-2; GPT-2 4.55 with one rate, 4.27 with those of
          its own; at 10.5 million 4.15, 4.57 and 4.22 (LOG.md).
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` and `data.tokenizer` are left for the command line."""
    config = default_config()
    config.model.size = "tiny"
    config.model.position = "rotary"
    config.model.head = "untied"
    config.model.linear_bias = "no"
    config.model.dropout = 0.0
    config.model.dtype = "float32"
    config.data.path = ""
    config.data.tokenizer = ""
    config.data.context = 128
    config.data.batch_size = 8
    config.optim.warmup_steps = 100
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip = 1.0
    config.train.steps = 1200
    config.train.eval_every = 300
    config.train.eval_batches = 20
    config.train.log_every = 10
    return config
