"""An object store for the tests, whose driver is found by every process that they start."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The folder below which `far://` lies; `.requests` in it lists what was asked of it."""
    import fsspec

    root, plugin = tmp_path / "far", tmp_path / "plugin"
    (plugin / "far_files-1.0.dist-info").mkdir(parents=True)
    (plugin / "far_files-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: far-files\nVersion: 1.0\n")
    (plugin / "far_files-1.0.dist-info/entry_points.txt").write_text("[fsspec.specs]\nfar = far_files:Far\n")
    (root / "bucket").mkdir(parents=True)
    (root / ".requests").touch()
    for folder in (str(plugin), str(HERE)):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path[:2] + [str(HERE.parents[1])]))
    monkeypatch.setenv("FAR_ROOT", str(root))
    from far_files import Far

    fsspec.register_implementation("far", Far, clobber=True)
    return root


@pytest.fixture
def requests(far):
    """A function (*words) -> the requests since its last call that contain these words."""
    seen = 0

    def since(*words):
        nonlocal seen
        lines = (far / ".requests").read_text().splitlines()
        new, seen = lines[seen:], len(lines)
        return [line for line in new if all(word in line for word in words)]

    return since
