"""Runs of language models that nobody trained: drawn parameters, on disk."""

import pytest
from flax import nnx

from aether.checkpoint import Checkpoints
from aether.config import build
from aether.data.tokenizers import Bytes, save_tokenizer
from aether.evaluate.load import load_run
from aether.testing import drawn_model
from aether.workdir import Workdir


@pytest.fixture(scope="session")
def write_bytes_run():
    """A function (folder, **sections) -> its path: a run on bytes with one checkpoint, 7, and a context of 32."""

    def write(folder, **sections):
        values = dict(
            model=dict(layers=2, heads=4, width=16, dtype="float32"),
            data=dict(context=32, batch_size=8),
            train=dict(loss_chunk=10),
        )
        for name, content in sections.items():
            values[name] = {**values.get(name, {}), **content}
        config = build(values).resolved(257)
        workdir = Workdir(str(folder))
        workdir.write_json("config.json", {"config": config.to_json(), "changes": []})
        save_tokenizer(Bytes(), str(folder / "tokenizer"))
        checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint)
        checkpoints.save(7, {"params": nnx.state(drawn_model(config)), "step": 7}, meta={})
        checkpoints.close()
        return str(folder)

    return write


@pytest.fixture(scope="session")
def bytes_run(write_bytes_run, tmp_path_factory):
    """The path of such a run."""
    return write_bytes_run(tmp_path_factory.mktemp("bytes_run"))


@pytest.fixture(scope="session")
def loaded(bytes_run):
    """The run itself, on all devices along data."""
    return load_run(bytes_run)
