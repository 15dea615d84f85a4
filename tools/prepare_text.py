"""Tokenise text once, into a folder that data.path and data.validation.NAME take.

  python tools/prepare_text.py --path=corpus.jsonl.zst --tokenizer=gpt2:FOLDER --out=prepared/corpus --workers=8

The path is a file, folder or glob of text, JSON lines or Parquet (plain or .gz, .zst, .xz), `python:stdlib`, or
`tfds:NAME[:SPLIT]`; it and --out may be gs:// or s3:// addresses (extras [gcs], [s3]). The same command goes on after
a kill. The last line on stdout is a JSON object with the counts.
"""

import functools
import json
import sys

from absl import flags

from launch import cli


def main(values: flags.FlagValues) -> None:
    """Prepare the folder and print its counts."""
    from aether.config import DataConfig
    from aether.data.cache import characters_of, worth_workers
    from aether.data.prepare import prepare
    from aether.data.sources import find_source
    from aether.data.tokenizers import chars_tokenizer, load_tokenizer

    path, out = cli.require(values, "path", "corpus.txt"), cli.require(values, "out", "prepared/corpus")
    config = DataConfig(
        path=path,
        tokenizer=values.tokenizer,
        text_key=values.text_key,
        tfds_dir=values.tfds_dir,
        validation_fraction=values.validation_fraction,
    )
    source = find_source(path, config)
    chars = config.tokenizer == "chars"
    tokenizer = chars_tokenizer(characters_of(source, config)) if chars else load_tokenizer(config.tokenizer)
    workers = worth_workers(source, tokenizer) if values.workers < 0 else values.workers
    tell = functools.partial(print, file=sys.stderr)
    manifest = prepare(source, config, tokenizer, out, workers, values.shard_tokens, log=tell).manifest
    for name in manifest["skipped"]:
        print(f"skipped {name}: not UTF-8 text", file=sys.stderr)
    counts = {k: sum(shard[k] for shard in manifest["shards"]) for k in ("tokens", "documents", "bytes")}
    splits = {name: end - begin for name, (begin, end) in ((n, s["tokens"]) for n, s in manifest["splits"].items())}
    about = dict(shards=len(manifest["shards"]), splits=splits, skipped=len(manifest["skipped"]))
    print(json.dumps(dict(out=out, **counts, **about, fingerprint=manifest["fingerprint"])))


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags()
    flags.DEFINE_string("path", "", "the text", values)
    flags.DEFINE_string("tokenizer", "bytes", "bytes, chars, a SentencePiece .model file, or gpt2:FOLDER", values)
    flags.DEFINE_string("out", "", "folder to write, local or remote", values)
    flags.DEFINE_integer(
        "workers",
        -1,
        "processes that tokenise (0: this one; -1: as many as it is worth)",
        lower_bound=-1,
        flag_values=values,
    )
    flags.DEFINE_float("validation_fraction", 0.1, "share held out as the split `validation`", flag_values=values)
    flags.DEFINE_string("text_key", "text", "the field with the text in JSONL, Parquet and TFDS records", values)
    flags.DEFINE_string("tfds_dir", "", "where TFDS data sets lie prepared", values)
    flags.DEFINE_integer(
        "shard_tokens", 1 << 26, "tokens after which a shard is closed", lower_bound=1, flag_values=values
    )
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
