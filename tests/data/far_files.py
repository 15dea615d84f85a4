"""An fsspec driver for the tests: `far://BUCKET/...` lies below $FAR_ROOT, and every request is written down there.

It is an installed driver to the processes that the tests start, too, which a protocol made up in a test would not be.
"""

import hashlib
import os
import time

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Far(DirFileSystem):
    protocol = "far"
    cachable = False

    def __init__(self, **kwargs):
        super().__init__(path=os.environ["FAR_ROOT"], fs=LocalFileSystem(auto_mkdir=True))

    def info(self, path, **kwargs):
        found = super().info(path, **kwargs)
        return {**found, "ETag": _digest(self._join(path))} if found["type"] == "file" else found

    def find(self, path, *args, **kwargs):
        return {name: self.info(name) for name in super().find(path)}

    def glob(self, path, **kwargs):
        return {name: self.info(name) for name in super().glob(path)}

    def cat_file(self, path, start=None, end=None, **kwargs):
        _note("read", path, start or 0)
        return super().cat_file(path, start=start, end=end)

    def pipe_file(self, path, value, **kwargs):
        _note("write", path)
        super().pipe_file(path, value)


def _digest(file):
    with open(file, "rb") as f:
        return hashlib.md5(f.read()).hexdigest()


def _note(*what):
    time.sleep(float(os.environ.get("FAR_DELAY", 0)))
    with open(os.path.join(os.environ["FAR_ROOT"], ".requests"), "a") as f:
        f.write(" ".join(map(str, what)) + "\n")
