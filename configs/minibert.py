"""MiniBERT: an encoder of ⵟ units without normalisation fills in masked text; BERT's block is one override away.

What:     4 blocks, 4 heads, width 128, rotary ⵟ-attention over 128 tokens in both directions; of 15 % of the tokens
          80 % are masked, 10 % replaced, 10 % as they are. A SentencePiece vocabulary of the text.
Tokenizer: python tools/train_tokenizer.py --path=wikitext-2/train.txt --out=wikitext.model --vocab_size=4096
Command:  python -m launch.train --config=configs/minibert.py --config.data.path=wikitext-2/train.txt \
              --config.data.validation.valid=wikitext-2/valid.txt --config.data.tokenizer=wikitext.model
Baseline: the same with --config.model.kind=bert --workdir=runs/bert
Linear:   the same with --config.model.attention=yat_linear, in time linear in the length.
Data:     any text; WikiText-2 has 2 million words.
Time:     10 minutes for 1000 steps on one shared core.
Result:   3.67 ± 0.06 nats a masked token after 1000 steps, BERT 4.02 ± 0.05 (three seeds; LOG.md).
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` and `data.tokenizer` are left for the command line."""
    config = default_config()
    config.model.kind = "minibert"
    config.model.size = "tiny"
    config.model.layers = 4
    config.model.heads = 4
    config.model.dtype = "float32"
    config.data.path = ""
    config.data.tokenizer = ""
    config.data.context = 128
    config.data.batch_size = 16
    config.train.steps = 2000
    config.train.eval_every = 500
    config.train.log_every = 10
    config.checkpoint.every = 500
    return config
