"""Files of arrays: what the library writes is read, what is written the library reads, damage is told."""

import json

import ml_dtypes
import numpy as np
import pytest

from aether.errors import InputError
from aether.export.tensors import read_tensors, write_tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "half": np.array([1.5, -3.0, 7.0], ml_dtypes.bfloat16),
    "count": np.array(5, np.int64),
    "none": np.zeros((0, 3), np.float32),
}


def same(got):
    assert got.keys() == ARRAYS.keys()
    for name, a in ARRAYS.items():
        assert got[name].dtype == a.dtype and got[name].shape == a.shape
        np.testing.assert_array_equal(got[name], a)


def test_round_trip(tmp_path):
    write_tensors(tmp_path / "x.safetensors", ARRAYS.items())
    same(read_tensors(tmp_path / "x.safetensors"))


def test_the_library_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    torch = pytest.importorskip("safetensors.torch")
    write_tensors(tmp_path / "x.safetensors", ARRAYS.items())
    found = torch.load_file(tmp_path / "x.safetensors")
    same({k: v.numpy() if k != "half" else v.float().numpy().astype(ml_dtypes.bfloat16) for k, v in found.items()})
    library.save_file({k: np.ascontiguousarray(v) if v.ndim else v for k, v in ARRAYS.items()}, tmp_path / "y")
    same(read_tensors(tmp_path / "y"))


def _written(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle, perhaps",
        (1 << 40).to_bytes(8, "little") + b"{}",
        _written({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 8])}, b"1234567"),
        _written({"a": dict(dtype="F32", shape=[3], data_offsets=[0, 8])}, b"12345678"),
        _written({"a": dict(dtype="F99", shape=[2], data_offsets=[0, 8])}, b"12345678"),
        _written({"a": [1]}),
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_damage_is_told(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="x.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_tensors(tmp_path / "x.safetensors")
