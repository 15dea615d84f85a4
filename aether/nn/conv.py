"""Convolutional ⵟ layers: prototypes that are compared with every patch of the input."""

import math
from collections.abc import Sequence
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from aether.kernels.conv import turned, yat_windows
from aether.kernels.window import (
    CONV_PADDINGS,
    TRANSPOSED_PADDINGS,
    Padding,
    Sizes,
    Window,
    check_padding,
    conv_window,
    per_axis,
    transposed_window,
)
from aether.kernels.yat import check_distance, ill_conditioned, unit
from aether.nn.param import compute_dtype
from aether.nn.prototypes import Prototypes, draw_prototypes, operand
from aether.nn.yat import LayerOptions, YatUnit, kernel_options, unit_options


class _Convolution(YatUnit, Prototypes):
    """What convolutions and transposed ones share: they differ in the window that they lay over the input."""

    spatial: ClassVar[int | None] = None
    in_features: int
    groups: int = 1
    spherical: bool
    distance: str
    dtype: str

    def window(self, x: Array) -> tuple[Array, Window]:
        """Return the window over x (b, spatial..., in_features), and x prepared for it."""
        raise NotImplementedError

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Map (..., spatial..., in_features) to (..., places..., out_features), with any leading axes or none.

        With a `key`, DropConnect masks the kernel; another one is needed for each call.
        """
        lead = x.shape[: -len(self.kernel_shape) + 1]
        x, window = self.window(self._batched(x))
        kernel = self.prototypes(key, self.dtype)
        y = yat_windows(x, kernel, window, spherical=self.spherical, distance=self.distance, **self.unit())
        return y.reshape(*lead, *y.shape[1:])

    def init_from_data(self, x: Array, key: Array, *, method: str = "kmeans++", noise: float = 0.0) -> None:
        """Make patches of `x` (..., spatial..., in_features) the prototypes, each of the channels of its group.

        Arguments and errors are those of `aether.nn.prototypes.draw_prototypes`.
        """
        patches, keys = self._patches(x), jax.random.split(key, self.groups)
        units = self.kernel_shape[-1] // self.groups
        drawn = [draw_prototypes(p, units, k, method=method, noise=noise) for p, k in zip(patches, keys, strict=True)]
        self.set_prototypes(jnp.concatenate(drawn))

    def ill_conditioned(self, x: Array, threshold: float = 1e3) -> Array:
        """Count the pairs of a patch of `x` and a prototype for which the expanded distance loses `threshold`.

        See `aether.kernels.yat.ill_conditioned`; a debugging aid, as slow as the exact distance.
        """
        patches = self._patches(x)
        kernel = self.prototypes(None, self.dtype).reshape(-1, self.groups, self.kernel_shape[-1] // self.groups)
        if self.spherical:
            patches, kernel = unit(patches), unit(kernel, 0)
        count = jax.vmap(lambda p, k: ill_conditioned(p, k, self.unit()["epsilon"], threshold), (0, 1))
        return jnp.sum(count(patches, kernel))

    def _batched(self, x: Array) -> Array:
        x = operand(x, self.in_features, self.dtype)
        axes = len(self.kernel_shape) - 1
        if x.ndim < axes:
            raise ValueError(
                f"x is {x.shape} and kernel_size {self.kernel_shape[:-2]}; "
                f"x must have {axes - 1} spatial axes and that of the features."
            )
        return x.reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:])

    def _patches(self, x: Array) -> Array:
        """Return the patches that each group sees, (groups, number, entries), entries in the kernel's order."""
        x, window = self.window(self._batched(x))
        patches = window.patches(x)
        patches = patches.reshape(-1, patches.shape[-2], self.groups, patches.shape[-1] // self.groups)
        return jnp.moveaxis(patches, 2, 0).reshape(self.groups, len(patches), -1)

    def _sizes(self, kernel_size: Sizes) -> tuple[int, ...]:
        axes = self.spatial or (max(len(kernel_size), 1) if isinstance(kernel_size, Sequence) else 1)
        return per_axis(kernel_size, axes, "kernel_size")


class YatConv(_Convolution):
    """y = α (p·w + b)² / (max(‖p‖² + ‖w‖² − 2 p·w, 0) + ε) of every patch p and every kernel w.

    The zeros of padding and dilation are entries of the patch. Names are those of `flax.nnx.Conv` and nmn; parameters:
    `kernel` (k..., in / groups, out), `bias` (out,) or (1,), `alpha` (1,), `epsilon_param` (1,).

    Args:
      in_features: channels of x.
      out_features: number of kernels.
      kernel_size: of the window, one number for each spatial axis. A single integer is a window over one axis, as in
        `flax.nnx.Conv`, and in `YatConv1D`, `YatConv2D`, `YatConv3D` the same for each of theirs.
      strides: steps of the window; one number, or one for each axis, as are the dilations.
      padding: "SAME", "VALID", "CAUSAL" (one axis only), "CIRCULAR", "REFLECT", or zeros: a number, one for each axis,
        or (low, high) for each.
      input_dilation: put this minus one zeros between the entries of the input, padded in numbers or "VALID".
      kernel_dilation: leave out this minus one places between the entries of the window.
      feature_group_count: groups of outputs that see only their own share of the channels.
      spherical: compare the directions of p and w only: both become unit vectors, D = 2 − 2 cos; a zero patch stays 0.
      distance: "expanded", or "exact", by differences: see `aether.nn.YatNMN`.
      axes: logical names of the kernel's last two axes.
      dtype: compute dtype; parameters are float32.
      rngs: source of the initial parameters.
      **options: see `UnitOptions` and `KernelOptions`.

    Raises:
      ValueError: an option is out of its range, or the groups do not divide the features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sizes,
        strides: Sizes | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: Sizes | None = 1,
        kernel_dilation: Sizes | None = 1,
        feature_group_count: int = 1,
        spherical: bool = False,
        distance: str = "expanded",
        axes: tuple[str, str] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[LayerOptions],
    ):
        size = self._sizes(kernel_size)
        n, groups = len(size), feature_group_count
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(
                f"feature_group_count is {groups}, in_features {in_features} and out_features {out_features}; "
                "it must divide both."
            )
        shape = (*size, in_features // groups, out_features)
        self.init_kernel(shape, (None,) * n + axes, rngs=rngs, **kernel_options(options))
        self.init_unit((out_features,), (1,), axes[1:], rngs=rngs, **unit_options(options))
        self.in_features, self.groups = in_features, groups
        self.strides = per_axis(strides, n, "strides")
        self.input_dilation = per_axis(input_dilation, n, "input_dilation")
        self.padding = check_padding(padding, n, CONV_PADDINGS, dilated=max(self.input_dilation) > 1)
        self.kernel_dilation = per_axis(kernel_dilation, n, "kernel_dilation")
        self.spherical, self.distance, self.dtype = spherical, check_distance(distance), compute_dtype(dtype)

    def window(self, x: Array) -> tuple[Array, Window]:
        """Return the window over x (b, spatial..., in_features), and x wrapped or reflected if the padding says so."""
        return conv_window(
            x,
            self.kernel_shape[:-2],
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            groups=self.groups,
        )


class YatConvTranspose(_Convolution):
    """The transposed `YatConv`: patches are those of the input with strides − 1 zeros between its entries.

    Names are those of `flax.nnx.ConvTranspose` and nmn; parameters: `kernel` (k..., in, out), or (k..., out, in) with
    `transpose_kernel`, `bias` (out,) or (1,), `alpha` (1,), `epsilon_param` (1,). ‖w‖² is the whole kernel's.

    Args:
      in_features: channels of x.
      out_features: number of kernels.
      kernel_size: as in `YatConv`.
      strides: places that an entry of the input stands for; one number, or one for each axis, as is the dilation.
      padding: "SAME" (strides · size places), "VALID", "CIRCULAR" (those of the periodic input), or as many zeros
        around the dilated input as given: a number, one for each axis, or (low, high) for each.
      kernel_dilation: leave out this minus one places between the entries of the window.
      transpose_kernel: keep the kernel of the convolution from out_features to in_features that this one transposes.
      spherical: as in `YatConv`.
      distance: as in `YatConv`.
      axes: logical names of the input's and the output's axis of the kernel.
      dtype: compute dtype; parameters are float32.
      rngs: source of the initial parameters.
      **options: see `UnitOptions` and `KernelOptions`.

    Raises:
      ValueError: an option is out of its range, or a bank goes with `transpose_kernel`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sizes,
        strides: Sizes | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: Sizes | None = 1,
        transpose_kernel: bool = False,
        spherical: bool = False,
        distance: str = "expanded",
        axes: tuple[str, str] = ("embed", "mlp"),
        dtype: str = "float32",
        rngs: nnx.Rngs,
        **options: Unpack[LayerOptions],
    ):
        size = self._sizes(kernel_size)
        n = len(size)
        if transpose_kernel and options.get("kernel_bank") is not None:
            raise ValueError(
                "transpose_kernel is True with a kernel_bank, whose last axis counts prototypes; use False."
            )
        shape, names = (*size, in_features, out_features), axes
        if transpose_kernel:
            shape, names = (*size, out_features, in_features), (axes[1], axes[0])
            options.setdefault("kernel_init", nnx.initializers.variance_scaling(1.0, "fan_in", "normal", -1, -2))
        self.init_kernel(shape, (None,) * n + names, rngs=rngs, **kernel_options(options))
        self.kernel_shape = (*size, in_features, out_features)
        self.init_unit((out_features,), (1,), axes[1:], rngs=rngs, **unit_options(options))
        self.in_features, self.transpose_kernel = in_features, transpose_kernel
        self.strides = per_axis(strides, n, "strides")
        self.padding = check_padding(padding, n, TRANSPOSED_PADDINGS)
        self.kernel_dilation = per_axis(kernel_dilation, n, "kernel_dilation")
        self.spherical, self.distance, self.dtype = spherical, check_distance(distance), compute_dtype(dtype)

    def window(self, x: Array) -> tuple[Array, Window]:
        """Return the window over x (b, spatial..., in_features), and x wrapped if the padding is CIRCULAR."""
        return transposed_window(
            x,
            self.kernel_shape[:-2],
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            mirrored=self.transpose_kernel,
        )

    def raw_kernel(self) -> Array:
        """Return the float32 kernel as (k..., in, out), as the window meets it."""
        kernel = super().raw_kernel()
        return turned(kernel) if self.transpose_kernel else kernel

    def set_prototypes(self, vectors: Array) -> None:
        """Overwrite the kernel with the rows of `vectors` (out, entries)."""
        if self.transpose_kernel:
            self.kernel[...] = turned(vectors.T.reshape(self.kernel_shape)).astype(jnp.float32)
        else:
            super().set_prototypes(vectors)


class YatConv1D(YatConv):
    """`YatConv` over (..., length, in_features)."""

    spatial = 1


class YatConv2D(YatConv):
    """`YatConv` over (..., height, width, in_features)."""

    spatial = 2


class YatConv3D(YatConv):
    """`YatConv` over (..., depth, height, width, in_features)."""

    spatial = 3


class YatConvTranspose1D(YatConvTranspose):
    """`YatConvTranspose` over (..., length, in_features)."""

    spatial = 1


class YatConvTranspose2D(YatConvTranspose):
    """`YatConvTranspose` over (..., height, width, in_features)."""

    spatial = 2


class YatConvTranspose3D(YatConvTranspose):
    """`YatConvTranspose` over (..., depth, height, width, in_features)."""

    spatial = 3
