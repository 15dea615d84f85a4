"""Multi-head attention, its score a dot product or a ⵟ-product, with a key/value cache."""

from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from aether.kernels.attention import DotScore, Score, YatScore, attention, check_form
from aether.kernels.masks import Mask, check_window
from aether.kernels.normalization import Normalization
from aether.kernels.rope import rotate
from aether.kernels.yat import check_distance, unit
from aether.nn.linear import Linear
from aether.nn.param import check_sizes, compute_dtype
from aether.nn.prototypes import operand
from aether.nn.yat import UnitOptions, YatUnit
from aether.parallel import attend_over_mesh

Pair = tuple[Array, Array]  # of the queries, of the keys


class KVCache(NamedTuple):
    """Keys as they are scored (rotated, normalised) and values of the positions before `length`, (b, s, g, k) each."""

    key: Array
    value: Array
    length: Array


class AttentionOptions(TypedDict, total=False):
    """What dot-product and ⵟ-attention share; names are flax's where it has them."""

    num_kv_heads: int | None
    """Heads of keys and values; query head i reads number i // (num_heads / num_kv_heads). `num_heads` by default."""
    qkv_features: int | None
    """Width of all query heads together; `in_features` by default."""
    out_features: int | None
    """Width of the output; `in_features` by default."""
    in_kv_features: int | None
    """Width of `context` in cross attention; `in_features` by default."""
    use_bias: bool
    """Have biases in the four linear maps; True by default."""
    rope_theta: float | None
    """Base of the rotary wavelengths; no rotation by default."""
    window: int | None
    """A query sees itself and the window − 1 positions before it, which implies causality; all by default."""
    impl: str
    """"plain", with whole score matrices, "blockwise" and "flash", in memory linear in the length, or "auto": the best
    there is; see `aether.kernels.attention.attention`."""
    block: int | None
    """Most queries, and most keys, in a block of the blockwise form; by default a size that fits."""
    std: float | None
    """Standard deviation of the initial kernels of query, key and value; 1/√fan_in by default."""
    out_std: float | None
    """Of the output's initial kernel; the same by default."""
    dtype: str
    """Compute dtype, float32 by default; scores and weights are float32."""


class Attention(nnx.Module):
    """out(softmax(q·k/√d) v), with q, k, v and out linear maps.

    `y, _ = layer(x)` is self attention, `y, _ = layer(x, context)` cross attention.

    Args:
      in_features: width of x.
      num_heads: heads; must divide `qkv_features`.
      rngs: source of the initial kernels.
      others: see `AttentionOptions`.

    Raises:
      ValueError: heads do not divide what they split, or an option is unknown or out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        in_kv_features: int | None = None,
        use_bias: bool = True,
        rope_theta: float | None = None,
        window: int | None = None,
        impl: str = "plain",
        block: int | None = None,
        std: float | None = None,
        out_std: float | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        qkv_features, out_features, in_kv_features = (
            in_features if n is None else n for n in (qkv_features, out_features, in_kv_features)
        )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(in_features=in_features, num_heads=num_heads, num_kv_heads=num_kv_heads, qkv_features=qkv_features)
        check_window(window)
        check_form(impl, block)
        _check_heads(qkv_features, num_heads, num_kv_heads, rope_theta)
        width = qkv_features // num_heads

        def linear(fan_in: int, fan_out: int, std: float | None, axes: tuple[str, str]) -> Linear:
            return Linear(fan_in, fan_out, std=std, use_bias=use_bias, axes=axes, dtype=dtype, rngs=rngs)

        self.query = linear(in_features, qkv_features, std, ("embed", "heads"))
        self.key = linear(in_kv_features, num_kv_heads * width, std, ("embed", "heads"))
        self.value = linear(in_kv_features, num_kv_heads * width, std, ("embed", "heads"))
        self.out = linear(qkv_features, out_features, out_std, ("heads", "embed"))
        self.in_features, self.in_kv_features = in_features, in_kv_features
        self.num_heads, self.num_kv_heads, self.head_features = num_heads, num_kv_heads, width
        self.rope_theta, self.window = rope_theta, window
        self.impl, self.block = impl, block
        self.dtype = compute_dtype(dtype)

    def prepare(self, x: Array) -> Array:
        """Return queries or keys (b, t, h, k) as the score takes them; keys are cached like that."""
        return x

    def score(self) -> Score:
        """Return what compares prepared queries and keys."""
        return DotScore()

    def weighting(self) -> Normalization:
        """Return what makes weights of the scores."""
        return Normalization()

    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        is_causal: bool = False,
        mask: Array | None = None,
        segments: Array | Pair | None = None,
        valid: Array | None = None,
        positions: Array | Pair | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Attend.

        Args:
          x: (b, t, in_features).
          context: (b, s, in_kv_features), where keys and values come from; x itself by default, with s = t.
          is_causal: position t sees positions 0 … t; a cache implies it.
          mask: booleans broadcastable to (b, h, t, s), True where a query may look.
          segments: (b, t) numbers; attention stays inside equal ones. In cross attention a pair (b, t), (b, s).
          valid: (b, s) booleans, False for keys that are padding.
          positions: (b, t), for the rotation alone; counted from 0, or from the cache's length. In cross attention a
            pair.
          cache: the keys and values before x, of `init_cache`; x's own are written behind them, and s is its length.
            It must have room for them: under `jit`, where its length is not known, what does not fit overwrites.

        Returns:
          (b, t, out_features), exact zeros before the output map where a query sees nothing; the cache with x in it.

        Raises:
          ValueError: shapes do not fit, cross attention is to be causal, or a cache comes with segments or context.
        """
        self._check_call(x, context, is_causal, segments, cache)
        q, k, v = self._project(x, x if context is None else context, positions, cache)
        if cache is not None:
            _check_room(cache, x.shape[1])
            at = (0, cache.length, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at)
            v = jax.lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at)
        of_queries, of_keys = _pair(segments)
        structure = Mask(
            causal=is_causal or cache is not None,
            window=self.window,
            offset=0 if cache is None else cache.length,
            query_segments=of_queries,
            key_segments=of_keys,
            valid=valid,
            dense=mask,
        )

        def attend(q: Array, k: Array, v: Array, mask: Mask, how: tuple[Score, Normalization]) -> Array:
            score, weighting = how
            return attention(q, k, v, score, mask=mask, normalization=weighting, impl=self.impl, block=self.block)

        y = attend_over_mesh(attend, q, k, v, structure, (self.score(), self.weighting()))
        y = self.out(checkpoint_name(y, "attention").reshape(*x.shape[:2], -1))
        return y, None if cache is None else KVCache(k, v, cache.length + x.shape[1])

    def weights(self, x: Array, rows: Array, *, is_causal: bool = False) -> tuple[Array, Array]:
        """Return what self attention does at the positions `rows` (r,) of x (b, t, in_features).

        Returns:
          The weights (b, h, r, t), and the values (b, t, h, k) they are given to: `out` of their weighted sum is what
          a call returns there.
        """
        q, k, v = self._project(x, x, None, None)
        behind = rows[:, None] - jnp.arange(x.shape[1])
        seen = jnp.ones_like(behind, bool) if not (is_causal or self.window) else behind >= 0
        seen &= True if self.window is None else behind < self.window
        one_hot = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=q.dtype)[:, None], (*k.shape[:3], x.shape[1]))
        how = dict(mask=Mask(dense=seen), normalization=self.weighting())
        found = attention(q[:, rows], k, one_hot, self.score(), **how)  # type: ignore[arg-type]
        return found.transpose(0, 2, 1, 3), jnp.repeat(v, self.num_heads // self.num_kv_heads, 2)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Return an empty cache of `length` positions."""
        zeros = jnp.zeros((batch, length, self.num_kv_heads, self.head_features), self.dtype)
        return KVCache(zeros, zeros, jnp.zeros((), jnp.int32))

    def _project(
        self, x: Array, source: Array, positions: Array | Pair | None, cache: KVCache | None
    ) -> tuple[Array, Array, Array]:
        """Return queries (b, t, h, k), and keys and values (b, s, g, k), the first two prepared."""
        x, source = operand(x, self.in_features, self.dtype), operand(source, self.in_kv_features, self.dtype)
        q, k, v = self.query(x), self.key(source), self.value(source)
        q, k, v = (a.reshape(*a.shape[:2], -1, self.head_features) for a in (q, k, v))
        if self.rope_theta is not None:
            start = 0 if cache is None else cache.length
            of_queries, of_keys = _pair(positions)
            q, k = (
                rotate(a, start + jnp.arange(a.shape[1])[None] if p is None else _fit(p, a), self.rope_theta)
                for a, p in ((q, of_queries), (k, of_keys))
            )
        q, k = self.prepare(q), self.prepare(k)
        return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

    def _check_call(
        self, x: Array, context: Array | None, is_causal: bool, segments: Array | Pair | None, cache: KVCache | None
    ) -> None:
        source = x if context is None else context
        wanted = (self.in_features, x.shape[0], self.in_kv_features)
        if x.ndim != 3 or source.ndim != 3 or (x.shape[-1], source.shape[0], source.shape[-1]) != wanted:
            raise ValueError(
                f"x is {x.shape} and what keys come from {source.shape}; "
                f"they must be (b, t, {self.in_features}) and (b, s, {self.in_kv_features})."
            )
        if not x.size or not source.size:
            raise ValueError(f"x is {x.shape} and what keys come from {source.shape}; both need a position at least.")
        if context is not None and (is_causal or self.window is not None or cache is not None):
            raise ValueError(
                f"context is given with is_causal={is_causal}, window={self.window} and cache={cache is not None}; "
                "cross attention takes False, None and no cache, since its two sequences share no positions."
            )
        if context is not None and segments is not None and not isinstance(segments, tuple):
            raise ValueError(f"segments is one array {segments.shape}; cross attention takes a pair (b, t), (b, s).")
        if cache is None:
            return
        if segments is not None:
            raise ValueError("segments and cache are both given; a cache holds one document a row, so leave segments.")
        held, wanted = cache.key.shape, (x.shape[0], self.num_kv_heads, self.head_features)
        if (held[0], *held[2:]) != wanted or held[1] < x.shape[1]:
            raise ValueError(
                f"cache holds {held}; for x {x.shape} it must hold (b, s, g, k) with s ≥ t and b, g, k = {wanted}."
            )


def _pair(arrays: Array | Pair | None) -> tuple[Array | None, Array | None]:
    """Return what belongs to the queries and to the keys, which one array does to both."""
    return arrays if isinstance(arrays, tuple) else (arrays, arrays)


def _fit(positions: Array, x: Array) -> Array:
    if positions.shape not in (x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"positions is {positions.shape}; it must be {x.shape[:2]}, one for each position.")
    return positions


class YatAttentionOptions(AttentionOptions, UnitOptions, total=False):
    """The options of `Attention` and of a ⵟ unit; `use_bias` is about the linear maps, b, α and ε are (heads,)."""


class YatAttention(YatUnit, Attention):
    """Attention with the score s = α (q·k + b)² / ((‖q − k‖² + ε) √d), with b, α and ε one a head.

    Args:
      in_features: width of x.
      num_heads: heads; must divide `qkv_features`.
      normalization: of the scores of a row: "softmax" eˢ/Σeˢ, "l1" s/(Σs + ε), or "softermax" sⁿ/(Σsⁿ + 1e-12).
      power: n of softermax.
      spherical: compare the directions of q and k only (nmn: normalize_qk).
      use_score_bias: have a b.
      distance: "expanded" or "exact"; see `aether.kernels.yat.yat`.
      rngs: source of the initial parameters.
      **options: see `AttentionOptions` and `UnitOptions`.

    Raises:
      ValueError: heads do not divide what they split, or an option is unknown or out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        normalization: str = "softmax",
        power: float = 1.0,
        spherical: bool = False,
        use_score_bias: bool = True,
        distance: str = "expanded",
        rngs: nnx.Rngs,
        **options: Unpack[YatAttentionOptions],
    ):
        shared = {k: v for k, v in options.items() if k in AttentionOptions.__annotations__}
        of_unit = {k: v for k, v in options.items() if k not in shared} | dict(use_bias=use_score_bias)
        Attention.__init__(self, in_features, num_heads, rngs=rngs, **shared)  # type: ignore[arg-type]
        heads = (num_heads,)
        self.init_unit(heads, heads, ("heads",), rngs=rngs, **of_unit)  # type: ignore[arg-type]
        self.normalization, self.power = normalization, power
        self.weighting().checked()
        self.spherical = spherical
        self.distance = check_distance(distance)

    def prepare(self, x: Array) -> Array:
        """Return unit vectors if the score is of directions alone."""
        return unit(x) if self.spherical else x

    def score(self) -> Score:
        """Return what compares prepared queries and keys."""
        return YatScore(**self.unit(), spherical=self.spherical, distance=self.distance)

    def weighting(self) -> Normalization:
        """Return what makes weights of the scores; L1's constant is the unit's ε, as in nmn."""
        constant = self.unit()["epsilon"] if self.normalization == "l1" else 1e-12
        return Normalization(self.normalization, self.power, constant)


def _check_room(cache: KVCache, positions: int) -> None:
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length) + positions > cache.key.shape[1]:
        raise ValueError(
            f"cache holds {int(cache.length)} of {cache.key.shape[1]} positions and x has {positions} more; "
            "make a longer one with init_cache."
        )


def _check_heads(features: int, heads: int, kv_heads: int, rope_theta: float | None) -> None:
    if features % heads:
        raise ValueError(f"qkv_features is {features} and num_heads {heads}; the first must be a multiple.")
    if heads % kv_heads:
        raise ValueError(f"num_heads is {heads} and num_kv_heads {kv_heads}; the first must be a multiple.")
    if rope_theta is not None and features // heads % 2:
        raise ValueError(f"qkv_features / num_heads is {features // heads}; rotary positions need it to be even.")
