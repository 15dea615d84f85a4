"""Bytes a device: of shapes with shardings, and from what the compiler says, also when it refuses."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aether.config import MeshConfig
from aether.parallel import make_mesh
from aether.plan.memory import Memory, bytes_on_device, measured, refused
from aether.train.step import TrainState

PARAMETERS, MOMENTS, COUNTERS = 2 * 16 * 4 + 5 * 4, 2 * 16 * 4, 3 * 4


def shape(*dims, over=()):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())
    return jax.ShapeDtypeStruct(dims, "float32", sharding=NamedSharding(mesh, PartitionSpec(*over)))


@pytest.fixture
def like():
    kernel = shape(8, 16, over=("fsdp",))
    return TrainState(shape(), [kernel, shape(5)], [kernel], None, shape(), shape())


def test_a_shard_counts_and_a_copy_counts_whole(like):
    assert bytes_on_device(like.params) == PARAMETERS
    assert bytes_on_device(like) == PARAMETERS + MOMENTS + COUNTERS


def test_the_parts_add_up_to_what_the_compiler_says(like):
    analysis = SimpleNamespace(
        **dict(argument_size_in_bytes=1000, output_size_in_bytes=900, alias_size_in_bytes=880),
        **dict(temp_size_in_bytes=5000, generated_code_size_in_bytes=70),
        **dict(host_temp_size_in_bytes=6, host_argument_size_in_bytes=0),
    )
    memory = measured(SimpleNamespace(memory_analysis=lambda: analysis), like, [shape(4)])
    assert memory.total == memory.to_json()["total"] == 1000 + 900 - 880 + 5000 + 70
    assert (memory.parameters, memory.optimizer, memory.host) == (PARAMETERS, MOMENTS + COUNTERS, 6)
    assert memory.activations == 5000 + 16 + 20


@pytest.mark.parametrize(
    ("message", "total"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5 * 2**30),
        (
            "the total memory required for HLO temporaries (94.11G) exceeds available HBM (15.75G).",
            94.11 * 2**30 + PARAMETERS + MOMENTS + COUNTERS,
        ),
    ],
)
def test_a_refusal_is_read(like, message, total):
    memory = refused(f"RESOURCE_EXHAUSTED: {message}", like)
    assert isinstance(memory, Memory) and memory.total == pytest.approx(total, abs=1)


def test_a_refusal_without_numbers_is_none_of_ours(like):
    assert refused("RESOURCE_EXHAUSTED: scoped vmem", like) is None
