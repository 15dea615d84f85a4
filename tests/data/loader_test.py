import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from absl import flags

from aether.config import DataConfig
from aether.data.corpus import load_corpus, load_validation
from aether.data.loader import TrainSet, batch_ids, evaluation_batches, train_batches
from aether.data.prepare import prepare
from aether.data.sources import find_source
from aether.data.tokenizers import load_tokenizer
from aether.errors import InputError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three texts, whose windows are all different."""
    top = tmp_path_factory.mktemp("loader")
    for name, size in (("a", 4000), ("b", 2000), ("c", 1000)):
        lines = "".join(json.dumps({"text": f"{name}{i:03d} " * 9}) + "\n" for i in range(size // 40))
        (top / f"{name}.jsonl").write_text(lines)
    return top


@pytest.fixture
def config(place):
    return DataConfig(path=str(place / "a.jsonl"), context=16, batch_size=6, cache_dir=str(place / "cache"))


@pytest.fixture
def mixed(config, place):
    paths = {n: str(place / f"{n}.jsonl") for n in "abc"}
    return replace(config, mixture=paths, weights=dict(a=0.5, b=0.3, c=0.2))


def take(batches, n):
    found = list(itertools.islice(batches, n))
    if hasattr(batches, "close"):
        batches.close()
    return found


def until(done, what):
    """Wait for something that has to come."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.05)


def equal(left, right):
    return len(left) == len(right) and all(
        list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True)
    )


def test_shapes_and_fingerprint(config):
    corpus = load_corpus(config)
    (batch,) = take(train_batches(corpus.train, config, 0), 1)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((6, 17), "int32"),
        "segments": ((6, 17), "int32"),
        "positions": ((6, 17), "int32"),
        "mask": ((6, 16), "int32"),
    }
    assert load_corpus(config).fingerprint == corpus.fingerprint
    assert load_corpus(replace(config, tokenizer="chars")).fingerprint != corpus.fingerprint


def test_a_batch_is_a_function_of_seed_and_step(mixed):
    corpus = load_corpus(mixed)
    whole = take(train_batches(corpus.train, mixed, 3), 12)
    for step in (1, 7):
        assert equal(take(train_batches(corpus.train, mixed, 3, step), 5), whole[step : step + 5])
    assert equal(take(train_batches(corpus.train, replace(mixed, prefetch=1), 3), 12), whole)
    assert not equal(take(train_batches(corpus.train, mixed, 4), 12), whole)


def test_processes_share_the_batch(mixed):
    corpus = load_corpus(mixed)
    whole = take(train_batches(corpus.train, mixed, 3, 5), 4)
    shares = [range(0, 2), range(2, 4), range(4, 6)]
    parts = [take(train_batches(corpus.train, mixed, 3, 5, rows), 4) for rows in shares]
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[i]} for i in range(4)]
    assert equal(joined, whole)
    (some,) = take(train_batches(corpus.train, mixed, 3, 5, [0, 5]), 1)  # a mesh may scatter a process's rows
    assert equal([some], [{k: v[[0, 5]] for k, v in whole[0].items()}])


@pytest.fixture
def parsed():
    """absl's flags as a launcher leaves them, for Grain's processes."""
    before = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not before:
        flags.FLAGS.unparse_flags()


def test_workers_give_the_same_batches(mixed, parsed):
    corpus = load_corpus(mixed)
    whole = take(train_batches(corpus.train, mixed, 3, 2), 5)
    assert equal(take(train_batches(corpus.train, replace(mixed, workers=2), 3, 2), 5), whole)


class Noted:
    """40 examples that leave a line in a file when they are made, a function of nothing but their number."""

    def __init__(self, file, wait=lambda: None):
        self.file, self.wait = file, wait

    def __len__(self):
        return 40

    def __getitem__(self, index):
        with open(self.file, "a") as f:
            f.write(f"{index}\n")
        self.wait()
        return dict(number=np.int32(index))

    def draw(self, index, seed):
        return self[index]

    def blank(self):
        return dict(number=np.int32(-1))

    def fetch(self, indices):
        pass

    def made(self):
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0

    def settled(self):
        """Wait for the first to be made and then until no more are, and return how many there are."""
        deadline, before = time.monotonic() + 60, -1
        while self.made() != before or not before:
            assert time.monotonic() < deadline
            before = self.made()
            time.sleep(1)
        return before


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_is_read_ahead_than_asked(tmp_path, parsed, workers):
    noted, config = Noted(tmp_path / "made"), DataConfig(batch_size=1, prefetch=12, workers=workers)
    batches = train_batches([TrainSet("train", 1.0, noted)], config, 0)
    next(batches)
    # a process has one more in its hands, and so has the thread here that waits for it
    assert 12 <= noted.settled() - 1 <= 12 + 2 * workers
    batches.close()


def test_evaluation_is_read_ahead_from_the_start(tmp_path):
    noted = Noted(tmp_path / "made")
    batches = evaluation_batches(noted, DataConfig(batch_size=3, prefetch=2))
    assert noted.settled() == 6, "before anyone asks"
    assert [batch["number"].tolist() for batch in batches] == [
        *([k, k + 1, k + 2] for k in range(0, 39, 3)),
        [39, -1, -1],
    ]


@pytest.mark.parametrize("end", ["closed", "dropped", "cut short"])
def test_an_evaluation_that_is_given_up_reads_no_more(tmp_path, end):
    threads, gate = set(threading.enumerate()), threading.Semaphore(1)
    noted = Noted(tmp_path / "made", gate.acquire)
    batches = evaluation_batches(noted, DataConfig(batch_size=1, prefetch=8))
    if end == "cut short":
        assert list(itertools.takewhile(lambda batch: False, batches)) == []
    else:
        next(batches)
    until(lambda: noted.made() == 2, "the second waits at the gate")
    if end == "closed":
        batches.close()
    else:
        del batches
    gate.release(40)
    until(lambda: not set(threading.enumerate()) - threads, "its thread ends")
    assert noted.made() == 2


def test_evaluation_reads_in_as_many_threads_as_there_are_workers(tmp_path):
    together = threading.Barrier(3, timeout=30)  # which two threads would never pass
    noted = Noted(tmp_path / "made", together.wait)
    batches = evaluation_batches(noted, DataConfig(batch_size=1, workers=3), 39)
    assert [int(batch["number"][0]) for batch in batches] == [(2 * k + 1) * 40 // 78 for k in range(39)]


def test_workers_without_parsed_flags_say_so(mixed):
    corpus = load_corpus(mixed)
    parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.unparse_flags()
    try:
        with pytest.raises(InputError, match="data.workers above 0.*mark_as_parsed"):
            next(train_batches(corpus.train, replace(mixed, workers=1), 3))
    finally:
        if parsed:
            flags.FLAGS.mark_as_parsed()


def test_every_window_once_an_epoch_and_in_another_order_the_next(config):
    corpus = load_corpus(replace(config, batch_size=1))
    count = len(corpus.train[0].examples)
    single = replace(config, batch_size=1)
    epochs = [[batch_ids(corpus.train, single, 0, e * count + i)[0] for i in range(count)] for e in range(3)]
    assert all(sorted(e) == sorted(f"train:{i}" for i in range(count)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    neighbour = [batch_ids(corpus.train, single, 1, i)[0] for i in range(count)]
    assert all(neighbour != e for e in epochs)


def test_the_mixture_has_its_proportions_at_every_scale(mixed):
    corpus = load_corpus(mixed)
    names = [n.split(":")[0] for step in range(400) for n in batch_ids(corpus.train, mixed, 0, step)]
    for part in (names, names[:120], names[-120:]):
        count = Counter(part)
        for name, weight in mixed.weights.items():
            assert abs(count[name] / len(part) - weight) < 0.02
    assert list(corpus.validation) == ["validation_a", "validation_b", "validation_c"]


def test_batch_ids_name_the_rows(mixed):
    corpus = load_corpus(mixed)
    (batch,) = take(train_batches(corpus.train, mixed, 3, 7), 1)
    sets = {part.name: part.examples for part in corpus.train}
    for row, name in enumerate(batch_ids(corpus.train, mixed, 3, 7)):
        which, index = name.split(":")
        assert np.array_equal(sets[which][int(index)]["tokens"], batch["tokens"][row])


def test_a_late_step_is_reached_at_once(mixed):
    corpus = load_corpus(mixed)
    (late,) = take(train_batches(corpus.train, mixed, 0, 10**9), 1)
    assert late["tokens"].shape == (6, 17)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (3, 0), (1, 3), (3, 2)])
def test_validation_has_every_window_once(config, processes, workers):
    corpus = load_corpus(config)
    windows = corpus.validation["validation"]
    shares = np.arange(6).reshape(processes, -1)
    reading = replace(config, workers=workers)
    parts = [list(evaluation_batches(windows, reading, 0, rows)) for rows in shares]
    assert len({len(p) for p in parts}) == 1 and len(windows) % 6, "the last batch is to be ragged"
    rows = [row for i in range(len(parts[0])) for p in parts for row in zip(p[i]["tokens"], p[i]["mask"], strict=True)]
    assert all((tokens == windows[i]["tokens"]).all() for i, (tokens, _) in enumerate(rows[: len(windows)]))
    assert not any(mask.any() for _, mask in rows[len(windows) :])
    assert sum(mask.sum() for _, mask in rows) == windows.tokens - 1


def test_a_subset_of_validation_is_fixed_and_spread(config):
    corpus = load_corpus(config)
    windows = corpus.train[0].examples
    whole = list(evaluation_batches(windows, config))
    some = list(evaluation_batches(windows, config, 3))
    index = [next(i for i, b in enumerate(whole) if equal([b], [s])) for s in some]
    n = len(whole)
    assert len(index) == 3 and index[0] < n / 3 <= index[1] < 2 * n / 3 <= index[2]
    assert equal(list(evaluation_batches(windows, config, 10**6)), whole)


def test_named_validation_sets_leave_all_of_the_text_to_train_on(config, place):
    named = replace(config, validation=dict(bee=str(place / "b.jsonl"), sea=str(place / "c.jsonl")))
    corpus = load_corpus(named)
    assert list(corpus.validation) == ["bee", "sea"]
    assert corpus.train[0].examples.documents == 100 and load_corpus(config).train[0].examples.documents == 90
    again = load_validation(str(place / "b.jsonl"), config, corpus.tokenizer)
    assert len(again) == len(corpus.validation["bee"]) and again.documents == 50


def test_chars_of_a_mixture_cover_all_its_texts(mixed):
    corpus = load_corpus(replace(mixed, tokenizer="chars"))
    assert corpus.tokenizer.characters == " 0123456789abc"


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_a_prepared_folder_is_used_as_it_is(config, tmp_path, tokenizer):
    made = replace(config, tokenizer=tokenizer, validation_fraction=0.3)
    corpus = load_corpus(made)
    out = str(tmp_path / "out")
    prepare(find_source(config.path, made), made, corpus.tokenizer, out, progress=False)
    from_folder = load_corpus(replace(config, path=out, tokenizer=tokenizer))
    assert from_folder.fingerprint == corpus.fingerprint
    assert from_folder.validation["validation"].documents == 30
    other = "chars" if tokenizer == "bytes" else "bytes"
    with pytest.raises(InputError, match=rf"prepared with the tokenizer {tokenizer}.* data.tokenizer is {other}"):
        load_corpus(replace(config, path=out, tokenizer=other))


def test_a_corpus_shorter_than_a_sequence(config, tmp_path):
    (tmp_path / "short.txt").write_text("ten bytes.")
    short = replace(config, path=str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match=r"short.txt \(train\) has 10 tokens, and data.context=16 needs at least 17"):
        load_corpus(short)


def test_the_summary_counts_and_names_what_was_skipped(config, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 200)
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    lines = []
    corpus = load_corpus(replace(config, path=str(tmp_path)), log=lines.append)
    assert lines == corpus.summary
    assert any("skipped 1 files" in line and "picture.jpg" in line for line in lines)


def test_an_error_while_reading_ahead_arrives_as_it_is(config, monkeypatch):
    corpus = load_corpus(config)
    monkeypatch.setattr(corpus.train[0].examples, "vocab", 100)
    with pytest.raises(InputError, match="beyond the vocabulary"):
        next(train_batches(corpus.train, config, 0))


def test_prepared_tokenizers_must_match(config, tmp_path):
    out = str(tmp_path / "out")
    prepare(find_source(config.path, config), config, load_tokenizer("bytes"), out, progress=False)
    with pytest.raises(InputError, match="data.tokenizer is chars"):
        load_corpus(replace(config, mixture=dict(x=out), tokenizer="chars"))
    assert load_corpus(replace(config, mixture=dict(x=out))).train[0].name == "x"


PARENT = """
import multiprocessing, os, signal, sys
from absl import flags
from aether.config import DataConfig
from aether.data.corpus import load_corpus
from aether.data.loader import train_batches
if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    config = DataConfig(path=sys.argv[1], context=16, cache_dir=sys.argv[2], workers=1)
    batches = train_batches(load_corpus(config).train, config, 0)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(config, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, tmp_path / "parent.py", config.path, config.cache_dir]
    with open(tmp_path / "pids", "w") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=120)
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert children
    until(lambda: not any(map(_alive, children)), f"{children} end with their parent")


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
