"""Text on object stores: the same batches as from a disk, whatever is prepared where and by whom."""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from absl import flags

from aether import remote
from aether.config import DataConfig
from aether.data import blocks
from aether.data.cache import find
from aether.data.corpus import load_corpus
from aether.data.loader import evaluation_batches, train_batches
from aether.data.prepare import prepare as prepare_folder
from aether.data.sources import find_source
from aether.data.tokenizers import load_tokenizer, save_tokenizer
from aether.errors import InputError, StorageError

TOOL = Path(__file__).parents[2] / "tools/prepare_text.py"


@pytest.fixture
def place(tmp_path, far, monkeypatch):
    """A folder of texts of all kinds, and the same at far://bucket."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    top = tmp_path / "here"
    (top / "tree/deep").mkdir(parents=True)
    texts = [f"document {i} " + "héllo " * (i % 9) for i in range(150)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (top / "a.jsonl").write_bytes(lines)
    (top / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (top / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), top / "a.parquet", row_group_size=40)
    for name in ("z.txt", "b.txt", "deep/a.txt", "deep/b.md", "deep/.hidden"):
        (top / "tree" / name).write_text(f"{name} " * 150)
    (top / "tree/bad.bin").write_bytes(b"\xff\xfe")
    (top / "tree/empty.txt").touch()
    shutil.copytree(top, far / "bucket", dirs_exist_ok=True)
    return top


@pytest.fixture
def config(place, tmp_path):
    return DataConfig(path=str(place / "a.jsonl"), context=32, batch_size=4, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def parsed():
    before = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not before:
        flags.FLAGS.unparse_flags()


def batches(config):
    """Return the fingerprint of a corpus, some of its training batches, and its validation batches."""
    corpus = load_corpus(config)
    some = train_batches(corpus.train, config, 3, 5)
    found = list(itertools.islice(some, 6))
    some.close()  # ends the reading ahead, which might ask for a block together with what follows
    found += evaluation_batches(corpus.validation["validation"], config)
    return corpus.fingerprint, [{k: v.tolist() for k, v in batch.items()} for batch in found]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "tree", "tree/**/*.[tm]*", "tree/b.txt"]
)
def test_raw_texts_give_the_batches_of_a_disk(name, config, place):
    here = replace(config, path=f"{place}/{name}")
    assert batches(replace(config, path=f"far://bucket/{name}")) == batches(here)


def test_several_texts_and_tokenizers_too(config, place, far):
    save_tokenizer(load_tokenizer("bytes"), "far://bucket/tokenizer")
    names = dict(x="a.jsonl", y="tree")
    here = replace(config, mixture={k: f"{place}/{v}" for k, v in names.items()}, tokenizer="chars")
    there = replace(here, mixture={k: f"far://bucket/{v}" for k, v in names.items()})
    some = load_corpus(here), load_corpus(there)
    assert some[0].fingerprint == some[1].fingerprint
    (far / "bucket/gpt2").mkdir()
    with pytest.raises(InputError, match="gpt2:far://bucket/gpt2 finds neither"):
        load_tokenizer("gpt2:far://bucket/gpt2")


def prepare(out, source="far://bucket/a.jsonl", **env):
    command = [sys.executable, str(TOOL), f"--path={source}", f"--out={out}", "--shard_tokens=2000", "--workers=0"]
    return subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def test_a_remote_folder_is_written_shard_by_shard_and_read_by_blocks(
    config, place, far, requests, tmp_path, monkeypatch, parsed
):
    record = far / "bucket/out/shard-00001.json"
    killed = prepare("far://bucket/out", FAR_DELAY="0.05", AETHER_CACHE=str(tmp_path / "other"))
    while not record.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    with pytest.raises(InputError, match="far://bucket/out was not prepared to its end"):
        find("far://bucket/out", config)
    requests()
    code, _, err = finish(prepare("far://bucket/out"))
    assert code == 0, err
    written = [line.split("/")[-1] for line in requests("write")]
    assert written[-1] == "manifest.json" and written.count("manifest.json") == 1
    assert not {"tokens-00000.npy", "tokens-00001.npy"} & set(written) and "tokens-00003.npy" in written
    source, tokenizer = find_source("far://bucket/a.jsonl", config), load_tokenizer("bytes")
    again, local = (
        prepare_folder(source, config, tokenizer, out, 0, 2000) for out in ("far://bucket/out", str(tmp_path / "local"))
    )
    assert again.manifest == local.manifest and not requests("write")

    monkeypatch.setattr(blocks, "BLOCK", 512)
    here = batches(replace(config, path=str(tmp_path / "local")))
    requests()
    there = replace(config, path="far://bucket/out")
    assert batches(there) == here
    asked = requests("read", "tokens-")
    assert len(asked) == len(set(asked)) > 10, "each block once, by training and validation"
    assert not requests("documents-")
    monkeypatch.setattr(blocks, "BLOCK", 1 << 18)  # as in the worker processes, which fetch for themselves
    requests()
    assert batches(replace(there, workers=2, cache_dir=str(tmp_path / "third"))) == here
    assert requests("read", "tokens-")


def test_what_has_not_changed_is_not_read_again(config, far, requests):
    there = replace(config, path="far://bucket/tree/[bz].txt")
    first = load_corpus(there)
    assert requests("read", ".txt")
    assert load_corpus(there).fingerprint == first.fingerprint and not requests("read", ".txt")
    (far / "bucket/tree/z.txt").write_text("Z.txt " * 150)  # of the same size
    assert load_corpus(there).fingerprint != first.fingerprint and requests("read", "z.txt")


def test_messages(config, far, monkeypatch):
    from far_files import Far

    for path, say in (
        ("far://bucket/none.txt", "far://bucket/none.txt does not exist"),
        ("far://none/*.txt", r"far://none/\*.txt matches no file; change data.path"),
        ("far://bucket/a.jsonl/", "text_key to one of them"),
    ):
        with pytest.raises(InputError, match=say):
            load_corpus(replace(config, path=path, text_key="body"))

    def lost(self, path, **kwargs):
        raise ConnectionResetError("the store is gone")

    monkeypatch.setattr(Far, "cat_file", lost)
    with pytest.raises(StorageError, match="far://bucket/a.jsonl.* cannot be read: ConnectionResetError: the store"):
        load_corpus(replace(config, path="far://bucket/a.jsonl"))


def test_a_lost_connection_is_taken_up_in_the_middle_of_a_file(config, place, monkeypatch):
    from far_files import Far

    here = batches(replace(config, path=str(place / "a.jsonl.zst")))
    monkeypatch.setattr(remote, "BLOCK", 400)
    whole, fates = Far.cat_file, itertools.cycle([True, True, False])

    def shaky(self, path, start=None, end=None, **kwargs):
        if not next(fates):
            raise ConnectionResetError("for a moment")
        return whole(self, path, start=start, end=end)

    monkeypatch.setattr(Far, "cat_file", shaky)
    assert batches(replace(config, path="far://bucket/a.jsonl.zst")) == here


LOADER = """
import sys
from aether.config import DataConfig
from aether.data.cache import prepare_cached
from aether.data.sources import find_source
from aether.data.tokenizers import load_tokenizer
config = DataConfig(path=sys.argv[1], cache_dir=sys.argv[2])
source, tokenizer = find_source(config.path, config), load_tokenizer("bytes")
print("ready", flush=True)
sys.stdin.readline()
print(prepare_cached(source, config, tokenizer, lambda line: print(line, file=sys.stderr)).fingerprint)
"""


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_processes_that_start_together_prepare_once(config, tmp_path, requests, monkeypatch, before):
    there = replace(config, path="far://bucket/a.jsonl")
    if before == "damaged":
        made = load_corpus(there).train[0].examples
        os.truncate(Path(made.folder, "tokens-00000.npy"), 300)
        requests()
    monkeypatch.setenv("FAR_DELAY", "0.2")
    command = [sys.executable, "-c", LOADER, there.path, there.cache_dir]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    loaders = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        assert [p.stdout.readline() for p in loaders] == ["ready\n"] * 3
        for p in loaders:
            p.stdin.write("go\n")
            p.stdin.flush()
        done = [p.communicate(timeout=60) for p in loaders]
    finally:
        for p in loaders:
            p.kill()
            p.wait()
    assert not any(p.returncode for p in loaders), done
    assert len({out for out, _ in done}) == 1
    assert len(requests("read bucket/a.jsonl")) == 1, "prepared once, and the others wait"
    assert sum("again, because" in err for _, err in done) == (before == "damaged")
    (folder,) = Path(there.cache_dir, "text").iterdir()
    assert sorted(f.name for f in folder.iterdir())[-2:] == ["tokenizer", "tokens-00000.npy"]
