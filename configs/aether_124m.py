"""AetherGPT at the size of GPT-2 small, for one machine with accelerators; the GPT-2 baseline is one override away.

What:     12 layers, 12 heads, width 768, context 1024, GPT-2's BPE, 512 sequences (half a million tokens) a step,
          20,000 steps: 10.5 billion tokens.
Prepare:  python tools/prepare_text.py --path=texts/ --tokenizer=gpt2:FOLDER --out=prepared/
Command:  python -m launch.train --config=configs/aether_124m.py --config.data.path=prepared/ \
              --config.data.tokenizer=gpt2:FOLDER
Baseline: the same with --config.model.kind=gpt2 --workdir=runs/gpt2_124m; a fair one has rates of its own for table and
          head: --config.model.head=untied --config.optim.lr_scale.embedding=150 --config.optim.lr_scale.head/=5
          '--config.optim.no_decay=bias|alpha|epsilon|scale|embedding'
Data:     any large text in English, such as OpenWebText. FOLDER holds GPT-2's encoder.json and vocab.bpe.
Memory:   --config.train.accumulate=8 splits the batch into parts that a single device can hold. Attention holds no
          score matrices: a kernel of the platform where there is one, else block by block.
Time:     54 ms for 16 sequences on one NVIDIA H200, GPT-2 52 ms: 305,000 tokens a second, so 10 hours for all.
Result:   not measured at this length; after 550 steps of 64 sequences, two epochs of 18 million tokens of novels,
          4.30 nats a token, GPT-2 with rates of its own for table and head 4.29. Both with rotary positions, untied
          head, no biases in linear maps, and --config.optim.base_layers=12 (LOG.md).
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run; `data.path` and `data.tokenizer` are left for the command line."""
    config = default_config()
    config.model.size = "124m"
    config.model.dtype = "bfloat16"
    config.data.path = ""
    config.data.tokenizer = "gpt2:"
    config.data.context = 1024
    config.data.batch_size = 512
    config.data.prefetch = 8
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 700
    config.optim.beta2 = 0.95
    config.train.steps = 20_000
    config.train.eval_every = 1000
    config.train.eval_batches = 40
    config.train.log_every = 10
    config.checkpoint.every = 1000
    config.checkpoint.keep_every = 5000
    return config
