"""What a kernel is built from: its plan, known when it is traced, and the operands padded to whole blocks."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import tile
from aether.kernels.pallas.blocks import Blocks
from aether.kernels.scores import Score, YatScore

FACTOR, CONSTANT, BIAS, EPSILON = range(4)  # rows of the numbers a head


class Plan(NamedTuple):
    """What is known when a kernel is built: sizes, the form of scores, the structure of the mask."""

    form: tile.Form
    blocks: Blocks
    keys: int
    row_blocks: int
    column_blocks: int
    causal: bool
    window: int | None
    segments: bool
    valid: bool

    @property
    def parts(self) -> int:
        """Return in how many parts the backward pass takes the keys."""
        return math.ceil(self.column_blocks / self.held)

    @property
    def held(self) -> int:
        """Return the key blocks of a part."""
        return self.blocks.held // self.blocks.columns

    def steps(self, most: int) -> int:
        """Return how many key blocks a query block visits of `most` neighbouring ones."""
        if self.window is None:
            return most
        return min(most, (self.blocks.rows + self.window - 3) // self.blocks.columns + 2)

    def span(self, i: Any, offset: Any, part: Any = None) -> tuple[Any, Any]:
        """Return the first key block that query block `i` sees, of a part or of all, and the one after the last."""
        first, last = self._seen(i, offset)
        if part is None or self.parts == 1:
            return first, last
        return jnp.maximum(first, part * self.held), jnp.minimum(last, (part + 1) * self.held)

    def column(self, i: Any, step: Any, offset: Any, part: Any = None) -> Any:
        """Return the key block of a step; steps past the last stay there, so that nothing is fetched for them."""
        first, last = self.span(i, offset, part)
        return jnp.clip(first + step, 0, jnp.maximum(last, 1) - 1)

    def _seen(self, i: Any, offset: Any) -> tuple[Any, Any]:
        if not self.causal and self.window is None:
            return 0, self.column_blocks
        row, columns = i * self.blocks.rows + offset, self.blocks.columns
        last = jnp.minimum(jax.lax.div(row + (self.blocks.rows - 1), columns) + 1, self.column_blocks)
        if self.window is None:
            return 0, last
        return jax.lax.div(jnp.maximum(row - (self.window - 1), 0), columns), last


class Operands(NamedTuple):
    """Arrays as the kernels take them, padded to whole blocks."""

    plan: Plan
    offset: Array
    parameters: Array
    arrays: dict[str, Array]


def operands_of(
    q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization, blocks: Blocks
) -> Operands:
    """Pad the operands of attention to whole blocks, and put what is one a head or one a key together."""
    (t, width), s, heads = q.shape[-2:], k.shape[-2], q.shape[1] * q.shape[2]
    plan = Plan(
        tile.form_of(score, normalization.name == "softmax", q.dtype),
        blocks,
        s,
        math.ceil(t / blocks.rows),
        math.ceil(s / blocks.columns),
        mask.causal,
        mask.window,
        mask.query_segments is not None,
        mask.valid is not None,
    )
    more, over = plan.row_blocks * blocks.rows - t, plan.column_blocks * blocks.columns - s
    q, k, v = pad(q, -2, more), pad(k, -2, over), pad(v, -2, over)
    arrays = {"q": q, "k": k, "v": v}
    if plan.form.squares:
        arrays["square"] = jnp.sum(jnp.square(q.astype(jnp.float32)), -1)[..., None, :]
    if mask.query_segments is not None:
        arrays["query_segments"] = pad(mask.query_segments.astype(jnp.int32), -1, more)[:, None]
    if plan.segments or plan.valid:
        zeros = jnp.zeros((q.shape[0], s), jnp.int32)
        told = [zeros if a is None else a.astype(jnp.int32) for a in (mask.key_segments, mask.valid)]
        arrays["marks"] = pad(jnp.stack(told + [zeros] * 6, 1), -1, over)  # whole registers, which are transposed
    alpha = score.alpha if isinstance(score, YatScore) else 1.0
    numbers = [alpha / math.sqrt(width), normalization.constant]
    if isinstance(score, YatScore):
        numbers += [score.bias, score.epsilon]
    parameters = jnp.stack([jnp.broadcast_to(jnp.asarray(n, jnp.float32).reshape(-1), (heads,)) for n in numbers])
    return Operands(plan, jnp.asarray(mask.offset, jnp.int32).reshape(1), parameters, arrays)


def pad(x: Array, axis: int, n: int, value: float = 0) -> Array:
    """Append `n` entries to an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, n)
    return jnp.pad(x, widths, constant_values=value) if n else x
