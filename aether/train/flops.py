"""Model FLOPs utilisation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from aether.chips import chip_of
from aether.config import Config
from aether.models import describe_model


def matrix_parameters(params: Any) -> int:
    """Count the entries of the matrices that activations are multiplied by: block kernels and the head."""
    flat = dict(nnx.to_flat_state(params))
    tied = ("head", "kernel") not in flat
    return sum(v.size for path, v in flat.items() if path[-1] == "kernel" or (tied and path == ("embed", "embedding")))


def flops_per_step(config: Config) -> int:
    """Return the FLOPs of a resolved config's step, forward and backward, without what rematerialisation repeats.

    Of a transformer of text, a token: 6 · (matrix parameters) + 12 · layers · width · context (Chowdhery et al.).
    Of images, and with linear attention: three times the products and convolutions of a forward pass as it is traced.
    """
    m = config.model
    if config.unit == "tokens" and m.attention != "yat_linear":
        _, params, _ = describe_model(config)
        per_token = 6 * matrix_parameters(params) + 12 * m.layers * m.width * config.data.context
        return per_token * config.per_step
    image, whole = config.image, dataclasses.replace(m, attention_impl="plain")  # kernels say nothing of their products
    graph, params, extras = describe_model(dataclasses.replace(config, model=whole))
    shape = jax.ShapeDtypeStruct((1, image.size, image.size, image.channels), jnp.float32)
    if config.unit == "tokens":
        shape = jax.ShapeDtypeStruct((1, config.data.context), jnp.int32)

    def forward(params: nnx.State, extras: nnx.State, x: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, extras)
        return model(x) if config.unit == "images" else model.logits(model(x))

    traced = jax.make_jaxpr(forward)(params, extras, shape)
    return 3 * config.data.batch_size * product_flops(traced.jaxpr)


def product_flops(jaxpr: Jaxpr) -> int:
    """Return the FLOPs of the products and convolutions of a jaxpr; the body of a loop counts as often as it runs."""
    total = 0
    for e in jaxpr.eqns:
        inner = sum(product_flops(j) for j in jaxprs_in_params(e.params))
        total += inner * e.params.get("length", 1)
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            left = _shape(e.invars[0])
            total += 2 * math.prod(_shape(e.outvars[0])) * math.prod(left[k] for k in contracted)
        elif e.primitive.name == "conv_general_dilated":
            kernel, out = _shape(e.invars[1]), _shape(e.outvars[0])
            features = kernel[e.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(out) * math.prod(kernel) // features
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Return the devices' bf16 peak together, FLOP/s, or None where it is unknown (a CPU)."""
    chip = chip_of(devices[0].device_kind)
    return chip.peak / chip.devices * len(devices) if chip else None
