"""Self-attention by the spherical ⵟ-kernel, normalised by its sum, in time linear in the length."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels import features as maps
from aether.kernels.linear_attention import LinearState, divide, init_state, linear_attention, stream
from aether.kernels.rope import rotate
from aether.kernels.yat import product, unit
from aether.nn.linear import Linear
from aether.nn.param import check_sizes, compute_dtype, normal
from aether.nn.prototypes import operand

FEATURES = ("anchored", "taylor", "slay")


class YatLinearAttention(nnx.Module):
    """out(Σ κ(q·k) v / Σ κ(q·k)) with κ(s) = (s + b)²/(2 + ε − 2s) of unit vectors, approximated by features.

    These are κ's own weights, without a softmax. b and ε are numbers, the same for all heads, since the features are
    made for them. Cost per position and head: num_features·(2·(head width + 1) + 1.5·chunk) multiply-adds at most,
    whatever the length; "anchored" adds its anchors squared. What the features are: `aether.kernels.features`.

    - "anchored" (Nyström; the most accurate) has the parameter `anchors` (heads, num_features − 1 − head width, head
      width), random at first: call `fit` on vectors of the data, then train them with the model.
    - "taylor" and "slay" are drawn from `feature_seed`, for each head apart, and are constants of the traced function:
      they are in no checkpoint, and the same seed gives them back. Give layers that should differ different seeds.

    Args:
      in_features: width of x and of the result.
      num_heads: heads; must divide `in_features`.
      features: one of the three above.
      num_features: of each head; with "taylor" from 2 + k up to 1 + k + k(k + 1)/2 for head width k, all exact then.
      bias: b ≥ 0.
      epsilon: ε > 0.
      tail_probability: of "taylor"; 0 cuts the kernel at degree 2. Above 0 the features are unbiased over draws, but
        the heads that draw the tail are lost.
      rope_theta: base of the rotary wavelengths; None for no rotation.
      std: standard deviation of the initial kernels of query, key and value; 1/√in_features by default.
      out_std: of the output's initial kernel; the same by default.
      use_bias: biases in the four linear maps.
      block: positions whose features exist at a time (causal, without segments).
      chunk: positions that are multiplied out at a time.
      feature_seed: of random features.
      dtype: compute dtype.
      rngs: source of the initial parameters.

    Raises:
      ValueError: a value is out of range, or `features` is none of the three.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        features: str = "anchored",
        num_features: int,
        bias: float = 1.0,
        epsilon: float = 0.1,
        tail_probability: float = 0.0,
        rope_theta: float | None = None,
        std: float | None = None,
        out_std: float | None = None,
        use_bias: bool = True,
        block: int = 1024,
        chunk: int = 128,
        feature_seed: int = 0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, num_heads=num_heads, num_features=num_features, block=block, chunk=chunk)
        if in_features % num_heads:
            raise ValueError(
                f"in_features is {in_features} and num_heads {num_heads}; in_features must be a multiple of num_heads."
            )
        width = in_features // num_heads
        if rope_theta is not None and width % 2:
            raise ValueError(f"rope_theta is {rope_theta} and the head width {width}; rotation needs an even width.")
        if tail_probability and features != "taylor":
            raise ValueError(
                f"tail_probability is {tail_probability}, features {features!r}; only 'taylor' has a tail."
            )
        options = dict(bias=float(bias), epsilon=float(epsilon))
        if features == "taylor":
            options["tail_probability"] = float(tail_probability)
        self.kind, self.options = features, tuple(options.items())
        _check(features, width, num_features, self.options)
        shape = (num_heads, num_features - 1 - width, width)
        anchored = features == "anchored"
        self.anchors = normal(rngs.params(), shape, width**-0.5, ("heads", None, None)) if anchored else None

        def linear(std: float | None, axes: tuple[str, str]) -> Linear:
            return Linear(in_features, in_features, std=std, use_bias=use_bias, axes=axes, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = (linear(std, ("embed", "heads")) for _ in range(3))
        self.out = linear(std if out_std is None else out_std, ("heads", "embed"))
        self.num_heads, self.num_features, self.width = num_heads, num_features, width
        self.rope_theta, self.feature_seed, self.dtype = rope_theta, feature_seed, compute_dtype(dtype)
        self.block, self.chunk = block, chunk

    def __call__(
        self,
        x: Array,
        positions: Array | None = None,
        *,
        is_causal: bool = True,
        mask: Array | None = None,
        segments: Array | None = None,
        cache: LinearState | None = None,
    ) -> tuple[Array, LinearState | None]:
        """Attend.

        Args:
          x: (b, t, in_features).
          positions: (b, t), for the rotation; 0 … t − 1 by default, to be given with a cache.
          is_causal: each position sees itself and those before it.
          mask: (b, t) booleans, False where x is padding, which nobody sees.
          segments: (b, t) documents, each a contiguous run with an id of its own; attention stays within.
          cache: what came before x; only causal, without segments.

        Returns:
          (b, t, in_features), and the cache with x in it.
        """
        if cache is not None and (not is_causal or segments is not None):
            raise ValueError("cache is given with is_causal=False or segments; it continues one causal document.")
        if cache is not None and positions is None and self.rope_theta is not None:
            raise ValueError("positions is None with a cache and rope_theta; give the positions of x, (batch, length).")
        q, k = self.prepare(x, positions)
        v = self.value(x).reshape(q.shape)
        phi, floor = self.feature_map()
        if segments is None and is_causal:
            start = self.init_cache(len(x))
            if cache is not None:
                held, wanted = (jax.tree.map(jnp.shape, state) for state in (cache, start))
                if held != wanted:
                    raise ValueError(f"cache is {held}; init_cache({len(x)}) makes one that fits x, {wanted}.")
                start = cache
            y, end = stream(phi, start, q, k, v, block=self.block, chunk=self.chunk, mask=mask, floor=floor)
            cache = None if cache is None else end
        else:
            y = linear_attention(
                phi(q),
                phi(k),
                v,
                causal=is_causal,
                chunk=self.chunk,
                mask=mask,
                segments=segments,
                floor=floor,
            )
        return self.out(y.reshape(x.shape)), cache

    def weights(self, x: Array, rows: Array, *, is_causal: bool = True) -> tuple[Array, Array]:
        """Return the weights (b, h, r, t) of `rows` (r,), and the values (b, t, h, k); see `Attention.weights`.

        These are what the features make of the kernel; with features that may be negative, so may they.
        """
        q, k = self.prepare(x)
        phi, floor = self.feature_map()
        sums = product("brhm,bthm->bhrt", phi(q[:, rows]), phi(k))
        seen = rows[:, None] >= jnp.arange(x.shape[1]) if is_causal else jnp.ones((len(rows), x.shape[1]), bool)
        sums = jnp.where(seen, sums, 0.0)
        return divide(sums, sums.sum(-1), seen.sum(-1), floor), self.value(x).reshape(q.shape)

    def prepare(self, x: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """Return the unit queries and keys (b, t, h, k) of x, rotated."""
        x = operand(x, self.num_heads * self.width, self.dtype)
        if x.ndim != 3 or not x.size:
            raise ValueError(f"x is {x.shape}; it must be (b, t, in_features) with at least one position.")
        b, t, _ = x.shape
        if positions is not None and positions.shape != (b, t):
            raise ValueError(f"positions is {positions.shape}; it must be {(b, t)}, one for each position of x.")
        q, k = (f(x).reshape(b, t, self.num_heads, self.width) for f in (self.query, self.key))
        if self.rope_theta is not None:
            positions = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        return unit(q), unit(k)

    def feature_map(self) -> tuple[Callable[[Array], Array], float]:
        """Return the map of unit vectors (..., h, k) to (..., h, m), and the smallest mean weight to divide by."""
        heads: Any
        if self.anchors is not None:
            heads = jax.lax.map(lambda z: maps.anchored(z, **dict(self.options)), self.anchors[...])
        else:
            with jax.ensure_compile_time_eval():
                heads = _draw(self.kind, self.width, self.num_features, self.options, self.feature_seed, self.num_heads)
            heads = jax.device_get(heads)

        def phi(x: Array) -> Array:
            return jax.vmap(lambda head, x: head(x), (0, -2), -2)(heads, x).astype(self.dtype)

        return phi, heads.floor

    def fit(self, x: Array, key: Array, positions: Array | None = None) -> None:
        """Set the anchors of each head to k-means centres of the queries and keys of x (b, t, in_features).

        b·t·2 must be at least the number of anchors. Give other data than will be attended to: anchors made from a
        sequence carry its future into its past.
        """
        if self.anchors is None:
            raise ValueError("fit is called on a layer without anchors; make it with features='anchored'.")
        count = self.anchors.shape[1]

        @jax.jit  # op by op it would compile each of them
        def centres(x: Array, key: Array) -> Array:
            vectors = jnp.stack(self.prepare(x, positions)).reshape(-1, self.num_heads, self.width)
            fit = partial(maps.fit_anchors, num_anchors=count)
            return jax.vmap(fit, (0, 1))(jax.random.split(key, self.num_heads), vectors)

        self.anchors[...] = centres(x, key)

    def init_cache(self, batch: int) -> LinearState:
        """Return the cache before any position; its size does not depend on the length."""
        return init_state(batch, self.num_heads, self.num_features, self.width)


def _check(features: str, width: int, num_features: int, options: tuple[tuple[str, float], ...]) -> None:
    """Raise a `ValueError` if such features cannot be made."""
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}; it must be one of {', '.join(FEATURES)}.")
    if features != "anchored":
        jax.eval_shape(lambda: _draw(features, width, num_features, options, 0, 1))
        return
    maps.check(width, **dict(options))
    if num_features < 2 + width:
        raise ValueError(f"num_features is {num_features} at head width {width}; it must be at least {2 + width}.")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _draw(
    features: str, width: int, num_features: int, options: tuple[tuple[str, float], ...], seed: int, heads: int
) -> maps.Slay | maps.Taylor:
    make: Any = maps.taylor if features == "taylor" else maps.slay
    keys = jax.random.split(jax.random.key(seed), heads)
    return jax.vmap(lambda key: make(key, width, num_features, **dict(options)))(keys)
