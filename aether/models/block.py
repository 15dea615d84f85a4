"""What all transformers here share: blocks made as a `ModelConfig` says, stacked, and the loop through them.

Axes: b batch, t position, d width, n layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from aether.config import ModelConfig
from aether.nn import Attention, KVCache, LayerNorm, Linear, YatAttention, YatLinearAttention, YatMLP
from aether.nn.param import stack
from aether.parallel import activation

USUAL_STD = 0.02  # GPT-2's, BERT's and ViT's initial standard deviation of everything


class MLP(nnx.Module):
    """out(GELU(hidden(x))), both linear; `YatMLP` stands in its place in ⵟ networks."""

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
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms are absent in ⵟ networks.

    Args:
      c: the resolved configuration.
      causal: whether a position sees only itself and those before it.
      rngs: source of the initial parameters.
    """

    def __init__(self, c: ModelConfig, causal: bool, rngs: nnx.Rngs):
        self.attention: Any = _attention(c, rngs)  # one of three, whose caches differ
        self.mlp = _mlp(c, rngs)
        self.norm1, self.norm2 = layer_norm(c), layer_norm(c)
        self.causal, self.rate = causal, c.dropout

    def __call__(
        self, x: Array, positions: Array | None, segments: Array | None, cache: KVCache | None, key: Array | None
    ) -> tuple[Array, KVCache | None]:
        """Add both branches to x (b, t, d), float32."""
        keys = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            y = self.norm1(x) if self.norm1 else x
            y, cache = self.attention(y, is_causal=self.causal, segments=segments, positions=positions, cache=cache)
            x = x + dropout(y, self.rate, keys[0])
        with jax.named_scope("mlp"):
            y = self.mlp(self.norm2(x) if self.norm2 else x)
            return x + dropout(y, self.rate, keys[1]), cache


def stacked(c: ModelConfig, causal: bool, rngs: nnx.Rngs) -> Block:
    """Make `c.layers` blocks as one whose parameters have a leading layers axis."""
    return stack(lambda r: Block(c, causal, r), c.layers, rngs)


def through(
    blocks: Block,
    c: ModelConfig,
    x: Array,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    cache: KVCache | None = None,
    key: Array | None = None,
) -> tuple[Array, KVCache | None]:
    """Run x through stacked blocks.

    Args:
      blocks: of `stacked`.
      c: what they were made from.
      x: (b, t, d) embeddings, float32.
      positions: (b, t), for rotations; None: counted from 0.
      segments: (b, t); attention stays inside equal numbers. None: one document.
      cache: leaves with a leading layers axis; causal blocks only.
      key: of dropout, on x too; None: no dropout.

    Returns:
      (b, t, d), float32, and the new cache. Statistics that a block notes (`nnx.BatchStat`) are left in `blocks`.
    """
    keys = None
    if key is not None and c.dropout:
        first, *rest = jax.random.split(key, c.layers + 1)
        x, keys = dropout(x, c.dropout, first), jnp.stack(rest)
    graph, state = nnx.split(blocks)

    def block(x: Array, layer: tuple) -> tuple[Array, tuple[KVCache | None, nnx.State]]:
        params, cache, key = layer
        x, one = checkpoint_name(activation(x), "stream"), nnx.merge(graph, params)
        x, cache = one(x, positions, segments, cache, key)
        return x, (cache, nnx.state(one, nnx.BatchStat))

    body = remat(c, block, looped=c.scan_layers and c.layers > 1)
    with jax.named_scope("blocks"):
        x, (cache, statistics) = jax.lax.scan(body, x, (state, cache, keys), unroll=1 if c.scan_layers else c.layers)
    nnx.update(blocks, statistics)
    return activation(x), cache


def remat(c: ModelConfig, block: Callable, *, looped: bool) -> Callable:
    """Wrap a block so that its backward pass recomputes what `model.remat` does not keep.

    In a loop that stays one, nothing more is needed; elsewhere XLA has to be kept from merging what is computed twice.
    """
    if c.remat == "none":
        return block
    policies = jax.checkpoint_policies
    choice: dict[str, Callable[[], Any]] = {
        "dots": lambda: policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("product")
        ),
        "full": lambda: policies.nothing_saveable,
        "names": lambda: policies.save_only_these_names(*c.kept_names()),
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["stream"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(block, policy=choice[c.remat](), prevent_cse=not looped)


def layer_norm(c: ModelConfig) -> LayerNorm | None:
    """Make what `model.norm` says."""
    return LayerNorm(c.width, use_bias=c.linear_bias == "yes", dtype=c.dtype) if c.norm == "layernorm" else None


def unit_options(c: ModelConfig, alpha: float, times: float = 1.0, power: float = 1.0) -> dict[str, Any]:
    """Return the options of a ⵟ unit, without whether it has a bias.

    Directions that have nothing to do with each other have a cosine u of order 1/√d in d dimensions. In a spherical
    unit `times` as wide as the base b follows it, and α makes up for (u + b)² of order 1/d, so that responses have one
    scale and one shape at every width; in scores, which are divided by √d as well, with power 3/2.
    """
    learned = dict(softplus_bias=c.yat_bias > 0, bias_init=c.yat_bias / times**0.5, alpha_init=alpha * times**power)
    return dict(**learned, learnable_epsilon=True, epsilon=c.epsilon, spherical=c.spherical)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Return x with entries left out at a rate, the others scaled up; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _branch_std(c: ModelConfig) -> tuple[float, float]:
    """Return the initial standard deviations of a branch's inner kernels and of its projection into the stream.

    Without a ⵟ unit the network is the usual one, and starts as that does.
    """
    usual = (c.attention, c.mlp) == ("dot", "gelu")
    return USUAL_STD if usual else c.width**-0.5, final_std(c) / (2 * c.layers) ** 0.5


def final_std(c: ModelConfig) -> float:
    """Return the initial standard deviation of maps out of the stream: by 1/√d, so that what they give is as large."""
    return USUAL_STD / (c.times_wider[0] ** 0.5 if c.has_units else 1.0)


def _attention(c: ModelConfig, rngs: nnx.Rngs) -> Attention | YatLinearAttention:
    std, out_std = _branch_std(c)
    kwargs: dict[str, Any] = dict(
        rope_theta=c.rope_theta if c.position == "rotary" else None,
        std=std,
        out_std=out_std,
        use_bias=c.linear_bias == "yes",
        dtype=c.dtype,
        rngs=rngs,
    )
    if c.attention == "yat_linear":
        features = c.features or 4 * c.width // c.heads
        return YatLinearAttention(c.width, c.heads, num_features=features, bias=c.yat_bias, epsilon=c.epsilon, **kwargs)
    if c.attention == "dot":
        return Attention(c.width, c.heads, impl=c.attention_impl, **kwargs)
    unit = unit_options(c, c.attention_alpha, c.times_wider[1], 1.5)
    return YatAttention(c.width, c.heads, use_score_bias=c.yat_bias > 0, impl=c.attention_impl, **unit, **kwargs)


def _mlp(c: ModelConfig, rngs: nnx.Rngs) -> MLP | YatMLP:
    std, out_std = _branch_std(c)
    use_bias = c.linear_bias == "yes"
    if c.mlp == "gelu":
        return MLP(c.width, c.hidden, std=std, out_std=out_std, use_bias=use_bias, dtype=c.dtype, rngs=rngs)
    unit = dict(use_bias=c.yat_bias > 0, **unit_options(c, c.mlp_alpha, c.times_wider[0]))
    return YatMLP(c.width, c.hidden, out_bias=use_bias, out_std=out_std, dtype=c.dtype, rngs=rngs, **unit)
