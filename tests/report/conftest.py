"""Tiny trained runs, and what was made of them once for all tests."""

import json
from functools import cache

import pytest

from aether.report.run import explain_run
from aether.report.subject import Asked
from aether.testing import tiny_run
from aether.train.loop import train


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """A function kind -> the folder of a tiny run."""

    @cache
    def make(kind):
        folder = tmp_path_factory.mktemp(f"run_{kind}")
        train(tiny_run(kind, folder), str(folder / "run"))
        return folder / "run"

    return make


@pytest.fixture(scope="session")
def explained(run_of, tmp_path_factory):
    """A function kind -> (result, numbers, folder) of all parts, with six inputs."""

    @cache
    def make(kind):
        out = tmp_path_factory.mktemp(f"explained_{kind}")
        lines = []
        result = explain_run(str(run_of(kind)), out=str(out), asked=Asked(inputs=6, length=12), log=lines.append)
        return result, json.loads((out / "explain.json").read_text()), out

    return make
