"""A table of vectors that is read by index, and compared with by the ⵟ-product."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.yat import check_distance, unit, yat
from aether.nn.param import Axes, Initializer, check_sizes, compute_dtype
from aether.nn.yat import UnitOptions, YatUnit

_OF_BIAS = ("constant_bias", "softplus_bias", "scalar_bias", "bias_init")


class YatEmbed(YatUnit):
    """Rows e_v by index; `attend(q)_v = α (q·e_v + b_v)² / (max(‖q − e_v‖², 0) + ε)`, with no b by default.

    The name, and those of the parameters, are nmn's: `embedding` (vocab, features), `alpha` (1,), `epsilon_param` (1,);
    a `bias` (vocab,) is there if asked for.

    Args:
      num_embeddings: rows.
      features: width of a row.
      spherical: `attend` compares directions only, D = 2 − 2 cos; rows that are looked up keep their lengths.
      weight_normalized: `attend` compares with unit rows; those that are looked up keep their lengths. (nmn makes rows
        unit vectors once, when they are created, so that they are not after the first training step.)
      distance: "expanded" or "exact", as in `YatNMN`.
      embedding_init: of `jax.nn.initializers`; by default N(0, 1/features): rows start near unit length.
      axes: logical names of the table's two axes.
      dtype: compute dtype, and that of the results; parameters are float32.
      rngs: source of the initial parameters.
      **options: see `UnitOptions`; there is a bias only if one of its options is given.

    Raises:
      ValueError: an option is out of its range.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        spherical: bool = False,
        weight_normalized: bool = False,
        distance: str = "expanded",
        embedding_init: Initializer | None = None,
        axes: Axes = ("vocab", "embed"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[UnitOptions],
    ):
        check_sizes(num_embeddings=num_embeddings, features=features)
        init = embedding_init or jax.nn.initializers.normal(features**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (num_embeddings, features), jnp.float32), axes=axes)
        options.setdefault("use_bias", any(name in options for name in _OF_BIAS))
        self.init_unit((num_embeddings,), (1,), axes[:1], rngs=rngs, **options)
        self.spherical = spherical
        self.weight_normalized = weight_normalized
        self.distance = check_distance(distance)
        self.dtype = compute_dtype(dtype)

    def __call__(self, ids: Array) -> Array:
        """Return the rows of `ids`, (..., features), in the compute dtype.

        As in `jnp.take`, negative ids count from the end and rows that do not exist are NaN.

        Raises:
          ValueError: the ids are not integers.
        """
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids are {ids.dtype}; they must be integers, such as int32.")
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)

    def attend(self, q: Array) -> Array:
        """Return the response of every row to q (..., features), (..., num_embeddings), in the compute dtype.

        Never negative for α ≥ 0: as weights (`softermax`) as it is, and as logits of a softmax.

        Raises:
          ValueError: the last axis of q is not `features` wide, or q holds no floating numbers.
        """
        features = self.embedding[...].shape[1]
        if q.shape[-1:] != (features,):
            raise ValueError(f"q is {q.shape} and features is {features}; the last axis of q must be features wide.")
        if not jnp.issubdtype(q.dtype, jnp.floating):
            raise ValueError(f"q is {q.dtype}; cast it to a floating dtype such as {self.dtype}.")
        table = (unit(self.embedding[...]) if self.weight_normalized else self.embedding[...]).astype(self.dtype)
        rows = (q[None] if q.ndim == 1 else q).astype(self.dtype)
        y = yat(rows, table, spherical=self.spherical, distance=self.distance, transposed=True, **self.unit())
        return y[0] if q.ndim == 1 else y
