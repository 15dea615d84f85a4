"""A state as named arrays: names from tree paths, copies, and refusals of what does not match."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from aether import arrays
from aether.arrays import named_leaves
from aether.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


class Net(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, use_bias=False, rngs=rngs)


def make_state():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    return TrainState(jnp.int32(0), params, optax.adamw(1e-3).init(params))


def test_names_come_from_tree_paths_alone():
    names = list(named_leaves(make_state()))
    assert names[:4] == ["step", "params/head/kernel", "params/mlp/bias", "params/mlp/kernel"]
    assert "opt_state/0/mu/mlp/kernel" in names and not any("value" in n for n in names)


def test_two_leaves_with_one_name_are_refused():
    with pytest.raises(ValueError, match="'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_a_dict_key_called_value_stays_in_the_name():
    assert list(named_leaves({"a": {"value": 1, "b": 2}})) == ["a/b", "a/value"]


def test_owned_copies():
    x = jnp.arange(1000.0)
    y = arrays.owned(x)
    assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer() and (x == y).all()
    n = np.zeros(3)
    assert not np.shares_memory(n, arrays.owned(n))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "C has no array p/w, which is float32"),
        ({"p/w": {"dtype": "float32", "shape": [3]}}, r"p/w as float32\[3\], but here it is float32\[2\]"),
        ({"p/w": {"dtype": "int32", "shape": [2]}}, "p/w as int32.* float32"),
        ({"p/w": {"dtype": "float32", "shape": [2]}, "p/v": {}}, "has an array p/v, which is not here"),
    ],
)
def test_what_does_not_match_is_refused(saved, message):
    with pytest.raises(InputError, match=message):
        arrays.check(saved, {"p/w": jnp.zeros(2)}, "p/", "C")


def test_arrays_outside_the_scope_do_not_matter():
    arrays.check({"p/w": {"dtype": "float32", "shape": [2]}, "other": {}}, {"p/w": np.zeros(2, "f")}, "p/", "C")
