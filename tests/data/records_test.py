import gzip
import importlib
import json
import lzma
import shutil
import sys
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from aether.config import DataConfig
from aether.data import records
from aether.data.sources import documents, find_source
from aether.errors import InputError, StorageError

TEXTS = ["one", "zwei äöü", "three\nlines\n", "\U0001f600"]
LINES = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS)).encode()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".xz"])
def test_json_lines_plain_and_compressed(tmp_path, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".xz": lzma.compress}[ending]
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(pack(LINES + b"\n  \n"))
    assert [t.decode() for _, t in documents(str(file), DataConfig())] == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
def test_text_compressed_and_damaged(tmp_path, ending):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".xz": lzma.compress}[ending]
    file = tmp_path / f"a.txt{ending}"
    whole = pack(b"some text " * 1000)
    file.write_bytes(whole)
    assert [t for _, t in documents(str(file), DataConfig())] == [b"some text " * 1000]
    for broken in (b"not compressed at all", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.txt.* damaged"):
            list(documents(str(file), DataConfig()))


@pytest.mark.parametrize(
    "line, say",
    [
        (b'{"text": "x"', "line 2 is not JSON"),
        (b'{"body": "x", "id": 3}', "line 2 has no 'text'; it has 'body', 'id'"),
        (b'{"text": 7}', "line 2 has int under 'text'"),
        (b'["x"]', "line 2 holds list"),
        (b'{"text": "\\ud800"}', "line 2 .* not valid Unicode"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
    ],
)
def test_a_bad_line_names_file_line_and_keys(tmp_path, line, say):
    file = tmp_path / "b.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"b\.jsonl {say}"):
        list(documents(str(file), DataConfig()))


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"body": [*TEXTS, None, ""], "n": list(range(6))})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    assert [t.decode() for _, t in documents(str(file), DataConfig(text_key="body"))] == TEXTS
    with pytest.raises(InputError, match=r"a\.parquet has no column 'text'; it has 'body', 'n'"):
        list(documents(str(file), DataConfig()))
    with pytest.raises(InputError, match="row 1 has int under 'n'"):
        list(documents(str(file), DataConfig(text_key="n")))
    file.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a Parquet file"):
        list(documents(str(file), DataConfig()))


def test_an_unreadable_file_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", file)

    file = tmp_path / "a.txt"
    file.write_text("x")
    monkeypatch.setattr(records, "open_binary", refuse)
    with pytest.raises(StorageError, match=r"a\.txt cannot be read: Permission denied"):
        list(documents(str(file), DataConfig()))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Prepare the small data set as ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("small_text_dataset")
        builder = module.SmallText(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        yield str(folder), module.TEXTS
    sys.path.remove(here)


@pytest.mark.filterwarnings("ignore")
def test_tfds_reads_splits(tfds_dir):
    folder, texts = tfds_dir
    config = DataConfig(tfds_dir=folder)
    found = [t.decode() for _, t in documents("tfds:small_text", config)]
    assert sorted(found[:20]) == sorted(texts["train"]) and sorted(found[20:]) == sorted(texts["validation"])
    only = [t.decode() for _, t in documents("tfds:small_text:validation", config)]
    assert sorted(only) == sorted(texts["validation"])
    source = find_source("tfds:small_text", config)
    assert [i.name for i in source.held_out] == ["validation"]


@pytest.mark.filterwarnings("ignore")
def test_tfds_errors_name_what_there_is(tfds_dir, tmp_path):
    config = DataConfig(tfds_dir=tfds_dir[0])
    with pytest.raises(InputError, match="'dev'; the data set has train, validation"):
        find_source("tfds:small_text:dev", config)
    with pytest.raises(InputError, match="'no_such_set'.*data.tfds_dir"):
        find_source("tfds:no_such_set", config)
    with pytest.raises(InputError, match="has no 'body'; it has 'text'"):
        list(documents("tfds:small_text", DataConfig(tfds_dir=tfds_dir[0], text_key="body")))
    with pytest.raises(InputError, match="is not prepared in .*tfds_dir"):
        find_source("tfds:small_text", DataConfig(tfds_dir=str(tmp_path)))


@pytest.mark.filterwarnings("ignore")
def test_a_remote_tfds_set_is_fetched_split_by_split_and_once(tfds_dir, far, requests, tmp_path):
    shutil.copytree(tfds_dir[0], far / "bucket/tfds")
    config = DataConfig(tfds_dir="far://bucket/tfds", cache_dir=str(tmp_path / "cache"))
    here = list(documents("tfds:small_text:validation", DataConfig(tfds_dir=tfds_dir[0])))
    assert list(documents("tfds:small_text:validation", config)) == here
    asked = requests("read")
    assert len(asked) == 3 and not any("train" in line for line in asked), "two descriptions and a file of records"
    assert list(documents("tfds:small_text:validation", config)) == here and not requests("read")
    with pytest.raises(InputError, match="tfds:no_such_set is not in far://bucket/tfds"):
        find_source("tfds:no_such_set", config)
