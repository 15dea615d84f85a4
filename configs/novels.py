"""A folder of plain-text books with a SentencePiece vocabulary of their own, on one accelerator.

What:     8 layers, 8 heads, width 512 (about 30 million parameters) on a vocabulary of 8192 pieces. Every file of the
          folder is a document; attention stays inside it. One book in ten is held out, by a hash of its name.
Tokenizer: python tools/train_tokenizer.py --path=books/ --out=books.model --vocab_size=8192
Command:  python -m launch.train --config=configs/novels.py --config.data.path=books/ \
              --config.data.tokenizer=books.model
Baseline: the same with --config.model.kind=gpt2 --workdir=runs/novels_gpt2; a fair one has rates of its own for table
          and head, about 0.09 and 5e-3 (LOG.md), with --config.model.head=untied
Data:     any hundred novels, such as those of Project Gutenberg; 70 MB are about 20 million tokens.
Time:     not measured yet.
Result:   not measured yet; see LOG.md.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` and `data.tokenizer` are left for the command line."""
    config = default_config()
    config.model.size = "124m"  # the three below are smaller; the baseline's learning rate is this size's
    config.model.layers = 8
    config.model.heads = 8
    config.model.width = 512
    config.model.dropout = 0.1  # a few passes over so little text
    config.model.dtype = "bfloat16"
    config.data.path = ""
    config.data.tokenizer = ""
    config.data.context = 512
    config.data.batch_size = 64
    config.optim.beta2 = 0.95
    config.train.steps = 3000
    config.train.eval_every = 500
    config.train.eval_batches = 40
    config.train.sample_prompt = "It was"
    return config
