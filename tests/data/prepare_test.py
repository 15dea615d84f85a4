import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aether.config import DataConfig
from aether.data import cache, prepare
from aether.data.cache import characters_of, find, prepare_cached
from aether.data.prepared import open_prepared, shard_file
from aether.data.sources import find_source
from aether.data.tokenizers import chars_tokenizer, load_tokenizer
from aether.errors import InputError, StorageError


def texts(n):
    return [f"document {i} " + "héllo " * (i % 7) for i in range(n)]


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(100)))
    return str(file)


def run(path, out, tokenizer="bytes", workers=0, shard_tokens=500, **knobs):
    config = DataConfig(tokenizer=tokenizer, **knobs)
    source = find_source(path, config)
    made = chars_tokenizer(characters_of(source, config)) if tokenizer == "chars" else load_tokenizer(tokenizer)
    return prepare.prepare(source, config, made, str(out), workers, shard_tokens, progress=False)


def read(prepared):
    """Return the decoded documents of each split."""
    folder, shards = prepared.folder, range(len(prepared.manifest["shards"]))
    ids = np.concatenate([np.load(shard_file(folder, "tokens", s)) for s in shards])
    tokenizer = prepared.tokenizer()
    found = {}
    for name, split in prepared.splits.items():
        begin, end = split["tokens"]
        part = ids[begin:end]
        starts = np.flatnonzero(part == tokenizer.eot)
        assert not len(part) or starts[0] == 0
        found[name] = [tokenizer.decode(d) for d in np.split(part, starts[1:])]
    return found


def test_documents_end_to_end_with_offsets_and_counts(jsonl, tmp_path):
    made = run(jsonl, tmp_path / "out")
    assert [t.decode() for t in sum(read(made).values(), [])] == texts(100)
    assert len(made.manifest["shards"]) > 3
    for number, shard in enumerate(made.manifest["shards"]):
        ids = np.load(shard_file(made.folder, "tokens", number))
        offsets = np.load(shard_file(made.folder, "documents", number))
        assert ids.dtype == np.uint16 and offsets.dtype == np.int64
        assert (np.flatnonzero(ids == 256) == offsets).all()
        assert (shard["tokens"], shard["documents"], shard["max_id"]) == (len(ids), len(offsets), 256)
        assert shard["bytes"] == len(ids) - len(offsets)


def test_records_hold_out_their_last_documents(jsonl, tmp_path):
    split = read(run(jsonl, tmp_path / "out", validation_fraction=0.25))
    assert len(split["train"]) == 75 and split["validation"][0].decode() == texts(100)[75]
    assert list(read(run(jsonl, tmp_path / "all", validation_fraction=0.0))) == ["train"]


@pytest.mark.parametrize("tokenizer", ["chars", "bytes"])
def test_a_text_file_holds_out_its_last_part(tmp_path, tokenizer):
    text = "añb" * 333 + "x"
    (tmp_path / "a.txt").write_text(text)
    split = read(run(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer))
    whole = text if tokenizer == "chars" else text.encode()
    cut = int(len(whole) * 0.9)
    joined = {k: v[0].decode() if tokenizer == "chars" else v[0] for k, v in split.items()}
    assert joined == dict(train=whole[:cut], validation=whole[cut:])


def test_processes_write_the_same_bytes(jsonl, tmp_path):
    one, two = run(jsonl, tmp_path / "one", "chars"), run(jsonl, tmp_path / "two", "chars", workers=2)
    assert one.manifest == two.manifest


def test_the_fingerprint_follows_text_tokenizer_and_split(jsonl, tmp_path):
    prints = [run(jsonl, tmp_path / "a").fingerprint, run(jsonl, tmp_path / "b", "chars").fingerprint]
    prints.append(run(jsonl, tmp_path / "c", validation_fraction=0.2).fingerprint)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(jsonl).read_text().replace("document 7", "document 8"))
    prints.append(run(str(other), tmp_path / "d").fingerprint)
    assert len(set(prints)) == 4
    assert run(jsonl, tmp_path / "e").fingerprint == prints[0]


def test_a_kill_leaves_shards_that_the_same_command_takes_up(tmp_path):
    corpus, out = tmp_path / "big.jsonl", tmp_path / "out"
    corpus.write_text("".join(json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(3000)))
    tool = os.path.join(os.path.dirname(prepare.__file__), "../../tools/prepare_text.py")
    command = [sys.executable, tool, f"--path={corpus}", f"--out={out}", "--workers=0", "--shard_tokens=50000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "shard-00003.json").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the machine was too quick: make the corpus larger"
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="was not prepared to its end"):
        find(str(out), DataConfig())
    kept = os.stat(out / "tokens-00002.npy").st_mtime_ns
    (out / "tokens-00099.npy.tmp123").write_text("left behind")
    resumed = run(str(corpus), out, shard_tokens=50000)
    assert os.stat(out / "tokens-00002.npy").st_mtime_ns == kept
    assert not any(".tmp" in f for f in os.listdir(out))
    assert resumed.fingerprint == run(str(corpus), tmp_path / "whole", shard_tokens=50000).fingerprint


def test_a_folder_with_something_else_is_left_alone(jsonl, tmp_path):
    run(jsonl, tmp_path / "out")
    with pytest.raises(InputError, match="another preparation .*tokenizer"):
        run(jsonl, tmp_path / "out", "chars")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and not a prepared folder"):
        run(jsonl, tmp_path / "mine")


def test_the_cache_is_used_until_the_text_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("some text " * 50)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    tokenizer = load_tokenizer("bytes")
    first = prepare_cached(find_source(str(file), config), config, tokenizer)
    monkeypatch.setattr(prepare, "_write_shards", lambda *a: pytest.fail("prepared again"))
    assert prepare_cached(find_source(str(file), config), config, tokenizer) == first
    monkeypatch.undo()
    file.write_text("other text " * 50)
    assert prepare_cached(find_source(str(file), config), config, tokenizer).fingerprint != first.fingerprint
    no_split = replace(config, validation_fraction=0.0)
    assert list(prepare_cached(find_source(str(file), no_split), no_split, tokenizer).splits) == ["train"]


def test_a_damaged_cache_is_made_again(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("some text " * 50)
    config, lines = DataConfig(cache_dir=str(tmp_path / "cache")), []
    first = prepare_cached(find_source(str(file), config), config, load_tokenizer("bytes"))
    with open(shard_file(first.folder, "tokens", 0), "r+b") as f:
        f.truncate(300)
    again = prepare_cached(find_source(str(file), config), config, load_tokenizer("bytes"), lines.append)
    assert again.fingerprint == first.fingerprint and "again, because" in lines[0]
    assert os.path.getsize(shard_file(first.folder, "tokens", 0)) > 900


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("AETHER_CACHE", "/somewhere")
    assert cache.cache_folder(DataConfig()) == "/somewhere"
    assert cache.cache_folder(DataConfig(cache_dir="/else")) == "/else"


@pytest.mark.parametrize(
    "change, say",
    [
        (lambda m: m.update(version=99), "format version 99 and this Aether reads 1"),
        (lambda m: m["shards"][0].update(max_id=300), "a token id beyond the vocabulary: 300, .* ids 0 to 256"),
        (lambda m: m["shards"][0].update(tokens=5), "tokens-00000.npy has .* bytes where its manifest needs"),
        (lambda m: m.pop("splits"), "manifest.json is damaged"),
    ],
)
def test_manifests_that_do_not_fit(jsonl, tmp_path, change, say):
    made = run(jsonl, tmp_path / "out")
    change(made.manifest)
    (tmp_path / "out/manifest.json").write_text(json.dumps(made.manifest))
    with pytest.raises(InputError, match=say):
        open_prepared(str(tmp_path / "out"))


def test_empty_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match="a.txt holds no text"):
        run(str(tmp_path / "a.txt"), tmp_path / "out")
    (tmp_path / "b.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(InputError, match="one document, so none can be held out"):
        run(str(tmp_path / "b.jsonl"), tmp_path / "out2")


def test_a_full_disk_is_a_storage_error(jsonl, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="plan.json: disk full"):
        run(jsonl, tmp_path / "out")
    assert not any(".tmp" in f for f in os.listdir(tmp_path / "out"))
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")


def test_an_unknown_character_names_the_source(jsonl, tmp_path):
    config = DataConfig(tokenizer="chars")
    with pytest.raises(InputError, match=r"corpus.jsonl: data.tokenizer=chars .* not 'd'"):
        prepare.prepare(find_source(jsonl, config), config, chars_tokenizer("abc"), str(tmp_path / "out"))
