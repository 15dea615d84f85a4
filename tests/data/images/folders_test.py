import os
import shutil

import numpy as np
import pytest
from PIL import Image

from aether.config import DataConfig
from aether.data.images import folders
from aether.errors import InputError


@pytest.fixture
def opened(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    return lambda root, strict=False: folders.open_folder(str(root), config, strict, lambda line: None)


@pytest.fixture
def damaged(tmp_path, class_folder, rng):
    """A folder with files that are no whole pictures, and what is said of each."""
    root = class_folder(tmp_path / "set")
    cat, wrong = root / "cat", {}
    for name in ("cut.jpg", "cut.png", "cut.webp"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(cat / name)
        whole = (cat / name).read_bytes()
        (cat / name).write_bytes(whole[: len(whole) * 2 // 3])
        wrong[f"cat/{name}"] = ""
    (cat / "empty.jpg").touch()
    (cat / "text.png").write_text("I am a picture, honestly.")
    (cat / "list.txt").write_text("a list")
    (cat / ".hidden").write_text("not counted")
    wrong |= {"cat/empty.jpg": "no picture that PIL knows", "cat/text.png": "no picture that PIL knows"}
    return root, wrong | {"cat/list.txt": "not .jpg, .jpeg, .png, .webp"}


def test_a_folder_by_class(tmp_path, class_folder, opened):
    root = class_folder(tmp_path / "set", ("dog", "cat", "eel"))
    (root / "cat/deeper").mkdir()
    shutil.copy(root / "dog/0.jpg", root / "cat/deeper/0.JPG")
    source = opened(root)
    assert source.classes == ("cat", "dog", "eel") and source.shape == (8, 8, 3) and source.held_out is None
    assert source.train.files[:7] == (
        *(f"cat/{i}.{e}" for i, e in enumerate(["jpg", "png", "webp"] * 2)),
        "cat/deeper/0.JPG",
    )
    assert source.train.targets.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    data, label = source.train[7]
    assert data == (root / "dog/0.jpg").read_bytes() and label == 1


@pytest.mark.parametrize("held", ["val", "validation", "test"])
def test_a_folder_with_a_split(tmp_path, class_folder, opened, held):
    class_folder(tmp_path / "set/train", count=4)
    class_folder(tmp_path / "set" / held, count=2)
    source = opened(tmp_path / "set")
    assert len(source.train) == 8 and source.held_out.files[0] == f"{held}/cat/0.jpg"
    assert source.held_out.targets.tolist() == [0, 0, 1, 1]


def test_tiny_imagenets_list_of_held_out_pictures(tmp_path, class_folder, opened):
    class_folder(tmp_path / "set/train", count=3)
    class_folder(tmp_path / "set/val", classes=("images",), count=3)
    (tmp_path / "set/val/val_annotations.txt").write_text(
        "0.jpg\tdog\t0\t0\t62\t62\n1.png\tcat\t0\t0\t9\t9\n2.webp\tdog\n"
    )
    source = opened(tmp_path / "set")
    assert dict(zip(source.held_out.files, source.held_out.targets.tolist(), strict=True)) == {
        "val/images/0.jpg": 1,
        "val/images/1.png": 0,
        "val/images/2.webp": 1,
    }


def test_tiny_imagenets_other_lists(tmp_path, class_folder, opened):
    """Boxes lie beside the pictures of a class, and are none; a held-out picture without a class is left out, named."""
    root = tmp_path / "set"
    class_folder(root / "train", count=3)
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
        (root / "train" / name).mkdir()
        (root / name).rename(root / "train" / name / "images")
        (root / "train" / name / f"{name}_boxes.txt").write_text("0.jpg\t0\t0\t62\t62\n")
    class_folder(root / "val", classes=("images",), count=3)
    (root / "val/val_annotations.txt").write_text("0.jpg\tdog\n2.webp\tcat\n1.png\tdog\n")
    source = opened(root, strict=True)
    assert len(source.train) == 6 and source.skipped == ()
    (root / "val/val_annotations.txt").write_text("0.jpg\tdog\n2.webp\tcat\n")
    source = opened(root)
    assert source.held_out.files == ("val/images/0.jpg", "val/images/2.webp")
    assert source.skipped == ("val/images/1.png (not in val_annotations.txt)",)
    with pytest.raises(InputError, match=r"1\.png cannot be used \(not in val_annotations\.txt\), one of 1 such"):
        opened(root, strict=True)
    (root / "train/cat/images/notes_boxes.txt").write_text("among pictures it is no list of theirs")
    assert "train/cat/images/notes_boxes.txt (not .jpg, .jpeg, .png, .webp)" in opened(root).skipped


def test_what_is_not_a_whole_picture_is_left_out_and_named(damaged, opened):
    root, wrong = damaged
    source = opened(root)
    assert len(source.train) == 12 and not set(source.train.files) & set(wrong)
    said = dict(line.removesuffix(")").split(" (", 1) for line in source.skipped)
    assert said.keys() == wrong.keys()
    for name, why in wrong.items():
        assert said[name] == why if why else "truncated" in said[name] or "decoder" in said[name]


def test_strict_stops_at_the_first_of_them(damaged, opened):
    with pytest.raises(InputError, match=r"cut\.jpg cannot be used \(.*truncated.*one of 6 such files.*image\.strict"):
        opened(damaged[0], strict=True)


def test_files_are_checked_once_until_one_changes(damaged, opened, monkeypatch):
    root, wrong = damaged
    looked = []
    monkeypatch.setattr(folders.decode, "facts", lambda data, f=folders.decode.facts: looked.append(1) or f(data))
    first = opened(root)
    assert len(looked) == 12 + len(wrong) - 1, "all but the .txt"
    looked.clear()
    assert opened(root).skipped == first.skipped
    assert not looked
    shutil.copy(root / "cat/0.jpg", root / "cat/cut.jpg")
    again = opened(root)
    assert looked and "cat/cut.jpg" in again.train.files and again.fingerprint != first.fingerprint
    (root / "dog/0.jpg").write_bytes(bytes((root / "dog/0.jpg").stat().st_size))
    assert "dog/0.jpg (no picture that PIL knows)" in opened(root).skipped


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_the_place(tmp_path, class_folder, opened):
    one = class_folder(tmp_path / "one")
    shutil.copytree(one, tmp_path / "two")
    os.utime(tmp_path / "two/cat/0.jpg", (1, 1))
    assert opened(one).fingerprint == opened(tmp_path / "two").fingerprint
    os.rename(tmp_path / "two/cat/0.jpg", tmp_path / "two/cat/9.jpg")
    assert opened(one).fingerprint != opened(tmp_path / "two").fingerprint


def test_many_files_are_checked_in_blocks(tmp_path, class_folder, opened, monkeypatch):
    monkeypatch.setattr(folders, "BLOCK", 5)
    root = class_folder(tmp_path / "set", count=7)
    (root / "dog/2.webp").write_bytes(b"")
    source = opened(root)
    assert len(source.train) == 13 and [line.split()[0] for line in source.skipped] == ["dog/2.webp"]


def test_a_file_of_another_format_than_its_ending_says(tmp_path, class_folder, smooth, opened):
    root = class_folder(tmp_path / "set")
    Image.fromarray(smooth(8, 8)).save(root / "cat/animated.jpg", "gif")
    assert "cat/animated.jpg" in opened(root).train.files


def test_links_to_folders_and_files(tmp_path, class_folder, opened):
    root, other = class_folder(tmp_path / "set"), class_folder(tmp_path / "other")
    shutil.rmtree(root / "dog")
    (root / "dog").symlink_to(other / "dog")
    (root / "cat/extra.jpg").symlink_to(other / "cat/0.jpg")
    (root / "cat/lost.jpg").symlink_to(other / "cat/nowhere.jpg")
    source = opened(root)
    assert source.classes == ("cat", "dog") and len(source.train) == 13 and "cat/extra.jpg" in source.train.files


def test_shapes_that_differ_and_grey_pictures(tmp_path, class_folder, smooth, opened):
    root = class_folder(tmp_path / "set")
    Image.fromarray(smooth(8, 9)).save(root / "dog/wide.png")
    assert opened(root).shape == (0, 0, 3)
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        Image.fromarray(smooth(4, 6, 1)[..., 0]).save(tmp_path / "grey" / name / "x.png")
    assert opened(tmp_path / "grey").shape == (4, 6, 1)


def test_folders_that_cannot_be_used(tmp_path, class_folder, opened):
    root = class_folder(tmp_path / "set")
    (root / "eel").mkdir()
    with pytest.raises(InputError, match="eel holds no picture; fill the folder or remove it"):
        opened(root)
    (root / "eel/a.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(InputError, match="eel holds no picture"):
        opened(root)
    shutil.rmtree(root / "eel")
    shutil.rmtree(root / "dog")
    with pytest.raises(InputError, match="has 1 class folders: cat; data.path takes"):
        opened(root)
    with pytest.raises(InputError, match="has 0 class folders; data.path takes"):
        opened(root / "cat")


def test_held_out_classes_that_are_not_trained_on(tmp_path, class_folder, opened):
    class_folder(tmp_path / "set/train")
    class_folder(tmp_path / "set/val", classes=("cat", "eel"))
    with pytest.raises(InputError, match="val has the class eel, which .*train does not have"):
        opened(tmp_path / "set")
    shutil.rmtree(tmp_path / "set/val/eel")
    (tmp_path / "set/val/dog").mkdir()
    with pytest.raises(InputError, match="val/dog holds no picture"):
        opened(tmp_path / "set")


def test_labels_are_of_the_type_that_batches_have(tmp_path, class_folder, opened):
    assert opened(class_folder(tmp_path / "set")).train.targets.dtype == np.int32
