"""All that a run learns from and is tested on: texts or images, found, prepared and opened."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from aether.config import Config, DataConfig
from aether.data.cache import characters_of, find, prepare_cached
from aether.data.examples import Examples
from aether.data.images.load import Labels, load_images
from aether.data.loader import TrainSet
from aether.data.masked import MaskedWindows
from aether.data.pack import Windows
from aether.data.prepared import Prepared, check_tokenizer
from aether.data.sources import KEYS, Source
from aether.data.tokenizers import Tokenizer, chars_tokenizer, load_tokenizer, save_tokenizer
from aether.errors import InputError

Log = Callable[[str], None]
TOKENIZER = "tokenizer"  # the folder within a run's


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Corpus:
    """All that a run learns from and is tested on.

    Attributes:
      fingerprint: changes when what it is trained on does, or the tokenizer.
      summary: lines a person wants to see at start-up.
      tokenizer: of texts; None for images.
      labels: of images; None for texts.
    """

    fingerprint: str
    train: list[TrainSet]
    validation: dict[str, Examples]
    summary: list[str]
    tokenizer: Tokenizer | None = None
    labels: Labels | None = None

    def resolved(self, config: Config) -> Config:
        """Decide what a config leaves to the data."""
        vocab = self.tokenizer.vocab_size if self.tokenizer else 0
        return config.resolved(vocab, self.labels.pictures if self.labels else None)

    def save(self, folder: Path) -> None:
        """Write the tokenizer or the labels into a run's folder, for those that use the model."""
        if self.tokenizer:
            save_tokenizer(self.tokenizer, str(folder / TOKENIZER))
        if self.labels:
            self.labels.save(str(folder))


def open_corpus(config: Config, log: Log = _silent) -> Corpus:
    """Find, prepare and open the data that `config.model.task` takes.

    Raises:
      InputError: data that are missing, empty, too small, damaged, or not what the task takes.
    """
    task = config.model.task
    if task == "classify":
        return _images(config, log)
    corpus = load_corpus(config.data, log)
    return masked(corpus, config.data.mask_rate) if task == "mlm" else corpus


def masked(corpus: Corpus, rate: float) -> Corpus:
    """Return the texts as a masked language model reads them."""
    assert corpus.tokenizer
    train = [replace(part, examples=masked_view(part.examples, rate, corpus.tokenizer)) for part in corpus.train]
    validation = {name: masked_view(text, rate, corpus.tokenizer) for name, text in corpus.validation.items()}
    return replace(corpus, train=train, validation=dict(validation))


def masked_view(windows: Examples, rate: float, tokenizer: Tokenizer) -> MaskedWindows:
    """Return windows of a text with a share of their tokens masked, by the id above the tokenizer's."""
    assert isinstance(windows, Windows)
    return MaskedWindows(windows, rate, tokenizer.vocab_size, tokenizer.vocab_size)


def _images(config: Config, log: Log) -> Corpus:
    found = load_images(config.data, config.image, log)
    return Corpus(
        fingerprint=found.fingerprint,
        train=[TrainSet("train", 1.0, found.train)],
        validation=dict(found.validation),
        summary=found.summary,
        labels=found.labels,
    )


def load_corpus(config: DataConfig, log: Log = _silent) -> Corpus:
    """Find, prepare (or take from the cache) and open the texts of a run.

    Raises:
      InputError: a text that is missing, empty, too short, or made with another tokenizer.
    """
    paths = config.mixture or {"train": config.path}
    found = {name: find(path, config) for name, path in paths.items()}
    tokenizer = _tokenizer(found, config)
    if config.validation:
        config = replace(config, validation_fraction=0.0)
    train: list[TrainSet] = []
    validation: dict[str, Examples] = {}
    summary, prints = [f"tokenizer {tokenizer.spec}: {tokenizer.vocab_size} ids"], [tokenizer.hash]
    for name, place in found.items():
        prepared = _prepared(place, config, tokenizer, log)
        train.append(
            TrainSet(name, config.weights.get(name, 1.0), _windows(prepared, "train", config, tokenizer, padded=False))
        )
        prints.append(f"{name} {prepared.fingerprint}")
        summary += _describe(name, prepared, "train")
        if not config.validation and "validation" in prepared.splits:
            held = f"validation_{name}" if config.mixture else "validation"
            validation[held] = _windows(prepared, "validation", config, tokenizer, padded=True)
            summary += _describe(held, prepared, "validation")
    for name, path in config.validation.items():
        validation[name] = text = load_validation(path, config, tokenizer, log)
        summary.append(f"{name}: {text.tokens:,} tokens from {path}")
    for line in summary:
        log(line)
    fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()[:32]
    return Corpus(fingerprint, train, validation, summary, tokenizer=tokenizer)


def load_validation(
    path: str, config: DataConfig, tokenizer: Tokenizer, log: Log = _silent, key: str = KEYS
) -> Windows:
    """Open the whole text behind a path for evaluation; `key` is what a person set to it.

    Of a prepared folder or a TFDS set that has a held-out split, that split is taken.
    """
    place = find(path, config, key)
    if isinstance(place, Source) and place.held_out:
        place = Source(place.path, place.held_out, place.single)
    prepared = _prepared(place, replace(config, validation_fraction=0.0), tokenizer, log)
    split = "validation" if "validation" in prepared.splits else "train"
    return _windows(prepared, split, config, tokenizer, padded=True)


def _tokenizer(found: dict[str, Source | Prepared], config: DataConfig) -> Tokenizer:
    if config.tokenizer != "chars":
        return load_tokenizer(config.tokenizer)
    for place in found.values():
        if isinstance(place, Prepared):
            tokenizer = place.tokenizer()
            if tokenizer.kind != "chars":
                raise InputError(
                    f"{place.folder} was prepared with the tokenizer {tokenizer.spec} and data.tokenizer is chars; "
                    f"set data.tokenizer={tokenizer.spec}, or prepare the text again."
                )
            return tokenizer
    return chars_tokenizer("".join(characters_of(s, config) for s in found.values() if isinstance(s, Source)))


def _prepared(place: Source | Prepared, config: DataConfig, tokenizer: Tokenizer, log: Log) -> Prepared:
    if isinstance(place, Source):
        return prepare_cached(place, config, tokenizer, log)
    check_tokenizer(place, tokenizer)
    return place


def _windows(prepared: Prepared, split: str, config: DataConfig, tokenizer: Tokenizer, padded: bool) -> Windows:
    return Windows(prepared, split, config.context, config.segments, tokenizer.eot, padded, tokenizer.vocab_size)


def _describe(name: str, prepared: Prepared, split: str) -> list[str]:
    part = prepared.splits[split]
    begin, end = part["tokens"]
    lines = [f"{name}: {end - begin:,} tokens in {part['documents']:,} documents from {prepared.manifest['source']}"]
    skipped = prepared.manifest["skipped"]
    if skipped and split == "train":
        names = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        lines.append(f"{name}: skipped {len(skipped)} files that are not UTF-8 text: {names}")
    return lines
