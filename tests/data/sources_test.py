import os
from pathlib import Path

import pytest

from aether.config import DataConfig
from aether.data.sources import documents, find_source, hold_out, read_items
from aether.errors import InputError


@pytest.fixture
def tree(tmp_path):
    """A folder with text, records, a hidden file, an empty one and one that is not text."""
    (tmp_path / "b/.git").mkdir(parents=True)
    for name, content in {
        "z.txt": b"last",
        "b/a.py": b"print()",
        "b/.git/x": b"hidden",
        ".hidden": b"x",
        "b/empty.txt": b"",
        "b/image.png": b"\x89PNG\xff",
        "c.jsonl": b'{"text": "r1"}\n{"text": "r2"}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_folder_is_read_in_order_and_what_is_not_text_is_remembered(tree):
    config = DataConfig(tokenizer="bytes")
    source = find_source(str(tree), config)
    found = list(read_items(source, source.items, config))
    assert found == [("c.jsonl:1", b"r1"), ("c.jsonl:2", b"r2"), ("z.txt", b"last"), ("b/a.py", b"print()")]
    assert source.skipped == ["b/image.png"]


def test_a_glob(tree):
    found = list(documents(f"{tree}/**/*.[tp][xy]*", DataConfig()))
    assert found == [("b/a.py", b"print()"), ("z.txt", b"last")]
    with pytest.raises(InputError, match=r"\*\.nothing matches no file"):
        find_source(f"{tree}/*.nothing", DataConfig())


def test_a_single_file_that_is_not_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 at byte 3"):
        list(documents(str(file), DataConfig(tokenizer="chars")))
    assert list(documents(str(file), DataConfig())) == [("latin.txt", b"caf\xe9 au lait")]


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt does not exist"):
        find_source(str(tmp_path / "nowhere.txt"), DataConfig())
    with pytest.raises(InputError, match=r"^data\.path is empty; set it .* to a file, folder or glob"):
        find_source("", DataConfig())
    with pytest.raises(InputError, match="holds no files"):
        find_source(str(tmp_path), DataConfig())


def test_the_standard_library_without_tests_and_packages():
    source = find_source("python:stdlib", DataConfig())
    names = [i.name for i in source.items]
    assert "os.py" in names and "json/decoder.py" in names and all(n.endswith(".py") for n in names)
    parts = {p for n in names for p in Path(n).parent.parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(os.path.islink(i.file) for i in source.items)
    assert sum(i.size for i in source.items) > 4e6


def test_files_are_held_out_by_a_hash_of_their_names(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    config = DataConfig()
    split = hold_out(find_source(str(tmp_path), config), 0.2)
    held = {i.name for i in split.held_out}
    assert 20 < len(held) < 60 and len(held) + len(split.items) == 200
    (tmp_path / "new.txt").write_text("more")
    again = {i.name for i in hold_out(find_source(str(tmp_path), config), 0.2).held_out}
    assert again - {"new.txt"} == held


@pytest.mark.parametrize("fraction", [0.01, 0.9])
def test_both_sides_have_a_file(tmp_path, fraction):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    split = hold_out(find_source(str(tmp_path), DataConfig()), fraction)
    assert len(split.items) == len(split.held_out) == 1
