"""AetherGPT and the GPT-2 baseline: one family, each part turned from one to the other by a field of `ModelConfig`.

Axes: b batch, t position, d width, v vocabulary, n layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from aether.config import ModelConfig
from aether.nn import Attention, Embed, KVCache, LayerNorm, Linear, YatAttention, YatMLP
from aether.nn.param import pad_axis, stack
from aether.parallel import activation, looked_up

_STD = 0.02  # GPT-2's initial standard deviation of everything


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _branch_std(c: ModelConfig) -> tuple[float, float]:
    """Return the initial standard deviations of a branch's inner kernels and of its projection into the stream."""
    inner = _STD if c.kind == "gpt2" else c.width**-0.5
    return inner, _STD / (2 * c.layers) ** 0.5


def _unit(c: ModelConfig, alpha: float) -> dict[str, Any]:
    """Return the options of a ⵟ unit, without whether it has a bias."""
    learned = dict(softplus_bias=c.yat_bias > 0, bias_init=c.yat_bias, alpha_init=alpha, learnable_epsilon=True)
    return dict(**learned, epsilon=c.epsilon, spherical=c.spherical)


def _attention(c: ModelConfig, rngs: nnx.Rngs) -> Attention:
    std, out_std = _branch_std(c)
    kwargs: dict[str, Any] = dict(
        rope_theta=c.rope_theta if c.position == "rotary" else None,
        std=std,
        out_std=out_std,
        use_bias=c.linear_bias == "yes",
        impl=c.attention_impl,
        dtype=c.dtype,
        rngs=rngs,
    )
    if c.attention == "dot":
        return Attention(c.width, c.heads, **kwargs)
    unit = _unit(c, c.attention_alpha)
    return YatAttention(c.width, c.heads, use_score_bias=c.yat_bias > 0, **unit, **kwargs)


def _mlp(c: ModelConfig, rngs: nnx.Rngs) -> "MLP | YatMLP":
    std, out_std = _branch_std(c)
    use_bias = c.linear_bias == "yes"
    if c.mlp == "gelu":
        return MLP(c.width, c.hidden, std=std, out_std=out_std, use_bias=use_bias, dtype=c.dtype, rngs=rngs)
    unit = dict(use_bias=c.yat_bias > 0, **_unit(c, c.mlp_alpha))
    return YatMLP(c.width, c.hidden, out_bias=use_bias, out_std=out_std, dtype=c.dtype, rngs=rngs, **unit)


class MLP(nnx.Module):
    """out(GELU(hidden(x))), both linear; `YatMLP` stands in its place in AetherGPT."""

    def __init__(
        self, width: int, hidden: int, *, std: float, out_std: float, use_bias: bool, dtype: str, rngs: nnx.Rngs
    ):
        shared: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.hidden = Linear(width, hidden, std=std, **shared)
        self.out = Linear(hidden, width, std=out_std, axes=("mlp", "embed"), **shared)

    def __call__(self, x: Array) -> Array:
        """Map (b, t, d) to itself."""
        h = jax.nn.gelu(checkpoint_name(self.hidden(x), "product"))
        return self.out(checkpoint_name(h, "hidden"))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms are absent in AetherGPT."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention = _attention(c, rngs)
        self.mlp = _mlp(c, rngs)
        norm = c.norm == "layernorm"
        use_bias = c.linear_bias == "yes"
        self.norm1 = LayerNorm(c.width, use_bias=use_bias, dtype=c.dtype) if norm else None
        self.norm2 = LayerNorm(c.width, use_bias=use_bias, dtype=c.dtype) if norm else None
        self.rate = c.dropout

    def __call__(
        self, x: Array, positions: Array, segments: Array | None, cache: KVCache | None, key: Array | None
    ) -> tuple[Array, KVCache | None]:
        """Add both branches to x (b, t, d), float32."""
        keys = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            y = self.norm1(x) if self.norm1 else x
            y, cache = self.attention(y, is_causal=True, segments=segments, positions=positions, cache=cache)
            x = x + _dropout(y, self.rate, keys[0])
        with jax.named_scope("mlp"):
            y = self.mlp(self.norm2(x) if self.norm2 else x)
            return x + _dropout(y, self.rate, keys[1]), cache


def remat(block: Callable, policy: str, names: list[str]) -> Callable:
    """Wrap a block so that its backward pass recomputes what `policy` (of `model.remat`) does not keep."""
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    choice: dict[str, Callable[[], Any]] = {
        "dots": lambda: policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("product")
        ),
        "full": lambda: policies.nothing_saveable,
        "names": lambda: policies.save_only_these_names(*names),
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["stream"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(block, policy=choice[policy](), prevent_cse=False)


class GPT(nnx.Module):
    """A decoder-only language model: embedding, scanned blocks, linear head.

    The residual stream is float32; what the branches compute is in `model.dtype`. With a tied head the logits are
    x·Eᵀ scaled so that they start as small as with GPT-2's table, whatever the embedding's own scale.

    Args:
      c: the resolved configuration.
      context: length of the table of learned positions.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, context: int, rngs: nnx.Rngs):
        self.config = c
        self.vocab = c.vocab
        self.embed = Embed(c.vocab, c.width, std=c.embed_std, rngs=rngs)
        pad_axis(self.embed.embedding, 0, c.rows)
        learned = c.position == "learned"
        axes = ("position", "embed")
        self.position = Embed(context, c.width, std=c.embed_std, axes=axes, rngs=rngs) if learned else None
        self.blocks = stack(lambda r: Block(c, r), c.layers, rngs)
        self.norm = (
            LayerNorm(c.width, use_bias=c.linear_bias == "yes", dtype=c.dtype) if c.norm == "layernorm" else None
        )
        tied = c.head == "tied"
        axes = ("embed", "vocab")
        self.head = None if tied else Linear(c.width, c.vocab, std=_STD, use_bias=False, axes=axes, rngs=rngs)
        if self.head is not None:
            pad_axis(self.head.kernel, 1, c.rows)

    def __call__(
        self,
        tokens: Array,
        *,
        segments: Array | None = None,
        positions: Array | None = None,
        cache: KVCache | None = None,
        key: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Run the network up to the head.

        Args:
          tokens: (b, t) ids.
          segments: (b, t); attention stays inside equal numbers. None: one document.
          positions: (b, t); None: counted from 0, or from the cache's length.
          cache: of `init_cache`, to continue from; excludes `segments`.
          key: of dropout; None: no dropout.

        Returns:
          (b, t, d) hidden states in the compute dtype, to be multiplied by `head_kernel`, and the new cache.
        """
        c = self.config
        b, t = tokens.shape
        start = 0 if cache is None else cache.length[0]
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(t), (b, t))
        with jax.named_scope("embed"):
            x = looked_up(self.embed, tokens)
            if self.position is not None:
                x = x + looked_up(self.position, positions)
        keys = None
        if key is not None and c.dropout:
            first, *rest = jax.random.split(key, c.layers + 1)
            x, keys = _dropout(x, c.dropout, first), jnp.stack(rest)

        graph, state = nnx.split(self.blocks)

        def block(x: Array, layer: tuple) -> tuple[Array, KVCache | None]:
            params, cache, key = layer
            x = checkpoint_name(activation(x), "stream")
            return nnx.merge(graph, params)(x, positions, segments, cache, key)

        body = remat(block, c.remat, c.kept_names())
        with jax.named_scope("blocks"):
            x, cache = jax.lax.scan(body, x, (state, cache, keys), unroll=1 if c.scan_layers else c.layers)
        x = activation(x)
        with jax.named_scope("head"):
            return (self.norm(x) if self.norm is not None else x).astype(c.dtype), cache

    def head_kernel(self) -> Array:
        """Return the (d, rows) matrix that turns hidden states into logits, float32.

        Its columns from `vocab` on pad it to sizes that divide well; no id has them.
        """
        if self.head is not None:
            return self.head.kernel[...]
        return self.embed.embedding[...].T * (_STD / self.config.embed_std)

    def logits(self, hidden: Array) -> Array:
        """Return float32 logits (b, t, v) of hidden states (b, t, d)."""
        kernel = self.head_kernel()[:, : self.vocab].astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Return an empty cache of `length` positions for every layer, leaves with a leading layers axis."""
        c = self.config
        shape = (c.layers, batch, length, c.heads, c.width // c.heads)
        zeros = jnp.zeros(shape, c.dtype)
        return KVCache(zeros, zeros, jnp.zeros((c.layers,), jnp.int32))
