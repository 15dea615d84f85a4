"""Train a SentencePiece tokenizer whose ids give back every byte of a text.

  python tools/train_tokenizer.py --path=corpus/ --out=corpus.model --vocab_size=8192 --type=bpe

Text is not normalised, no space is added or taken away, characters that the vocabulary lacks are spelled in bytes, and
runs of spaces may be one piece. `data.tokenizer=corpus.model` then uses it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator

from absl import flags

from launch import cli

CHUNK = 1000  # characters that are one "sentence" to the trainer


def main(values: flags.FlagValues) -> None:
    """Train the model, write it, and print what it is."""
    import io

    import sentencepiece

    from aether.config import DataConfig
    from aether.data.files import write
    from aether.data.tokenizers import load_tokenizer
    from aether.errors import InputError

    path, out = cli.require(values, "path", "corpus.txt"), cli.require(values, "out", "corpus.model")
    if not out.endswith(".model"):
        raise InputError(f"--out is {out}; its name takes the ending .model, by which data.tokenizer knows it.")
    config = DataConfig(path=path, tokenizer=out, text_key=values.text_key, tfds_dir=values.tfds_dir)
    made = io.BytesIO()
    with _trainer_errors(path, values.vocab_size):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(path, config),
            model_writer=made,
            model_type=values.type,
            vocab_size=values.vocab_size,
            hard_vocab_limit=values.type != "char",
            input_sentence_size=max(1, values.max_chars // CHUNK),
            shuffle_input_sentence=True,
            max_sentence_length=1 << 24,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            eos_piece="<|endoftext|>",
            bos_id=-1,
            pad_id=-1,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write(out, made.getvalue())
    tokenizer = load_tokenizer(out)
    print(json.dumps(dict(out=out, type=values.type, vocab_size=tokenizer.vocab_size, hash=tokenizer.hash)))


@contextlib.contextmanager
def _trainer_errors(path: str, vocab_size: int) -> Iterator[None]:
    """Turn what the trainer refuses into an `InputError`."""
    from aether.errors import InputError

    try:
        yield
    except RuntimeError as e:
        reason = str(e).split("] ")[-1].strip().rstrip(".")
        raise InputError(
            f"--vocab_size={vocab_size} does not fit {path}: {reason}; change it or give more text."
        ) from e


def _chunks(path: str, config) -> Iterator[str]:
    """Yield the texts cut before spaces, as encoding cuts them."""
    from aether.data.sources import documents
    from aether.data.tokenizers import split_text

    for _, text in documents(path, config):
        yield from split_text(text.decode(), CHUNK)


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags()
    flags.DEFINE_string("path", "", "the text: file, folder, glob, python:stdlib or tfds:NAME", values)
    flags.DEFINE_string("out", "", "the .model file to write", values)
    flags.DEFINE_integer("vocab_size", 8192, "number of ids", lower_bound=259, flag_values=values)
    flags.DEFINE_enum("type", "bpe", ["bpe", "unigram", "char"], "how pieces are chosen", values)
    flags.DEFINE_integer(
        "max_chars", 100_000_000, "characters of text, drawn evenly, to train on", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("text_key", "text", "the field with the text in JSONL, Parquet and TFDS records", values)
    flags.DEFINE_string("tfds_dir", "", "where TFDS data sets lie prepared", values)
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
