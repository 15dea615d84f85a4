"""Windows against flax's convolutions, in whole numbers: sums and products of these are exact in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.kernels.conv import convolve, patch_squares, turned
from aether.kernels.window import conv_window, transposed_window

CONVS = [
    # spatial sizes, kernel, groups, options
    *(((7,), (3,), 1, dict(padding=p)) for p in ("SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", 1, [2], [(0, 3)])),
    *(((8,), (4,), 2, dict(padding=p, strides=2)) for p in ("SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")),
    *(((9,), (3,), 1, dict(padding=p, kernel_dilation=2)) for p in ("SAME", "CAUSAL", "CIRCULAR", "REFLECT")),
    *(((5,), (2,), 1, dict(padding=p, input_dilation=3)) for p in (0, 1, [(0, 3)])),
    ((3,), (8,), 1, dict(padding="CIRCULAR")),  # more than once around
    ((5, 6), (3, 2), 2, dict(strides=(2, 1), kernel_dilation=(1, 3))),
    ((5, 6), (3, 2), 4, dict(padding=[(1, 2), 3], input_dilation=(2, 1))),
    ((5, 6), (3, 2), 1, dict(padding="CIRCULAR", kernel_dilation=2)),
    ((5, 6), (2, 4), 1, dict(padding="REFLECT", strides=3)),
    ((3, 4, 5), (2, 3, 1), 2, dict(strides=(1, 2, 3))),
    ((3, 4, 5), (2, 2, 2), 1, dict(padding="CIRCULAR", kernel_dilation=(1, 2, 1))),
]
NAMES = ("SAME", "VALID", "CIRCULAR")
TRANSPOSED = [
    *(((4,), (3,), dict(padding=p, strides=2, transpose_kernel=t)) for p in (*NAMES, 1, [(0, 3)]) for t in (0, 1)),
    *(((5,), (4,), dict(padding=p, transpose_kernel=t)) for p in NAMES for t in (0, 1)),
    *(((3,), (2,), dict(padding=p, strides=3)) for p in NAMES),
    *(((3,), (2,), dict(padding=p, strides=2, kernel_dilation=3, transpose_kernel=True)) for p in NAMES),
    ((2,), (9,), dict(padding="CIRCULAR", strides=2)),
    ((3, 4), (2, 3), dict(strides=(1, 2), padding="CIRCULAR")),
    ((3, 4), (3, 2), dict(strides=2, kernel_dilation=(1, 2), padding=[2, (1, 0)])),
    ((2, 3, 2), (2, 1, 3), dict(strides=(2, 1, 1), transpose_kernel=True)),
]


def whole(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


def compiled(f, *args):
    return jax.jit(f)(*args)


def flax_layer(kind, kernel, **options):
    """A layer of flax with this kernel and no bias."""
    sides = kernel.shape[-2:] if not options.get("transpose_kernel") else kernel.shape[:-3:-1]
    inputs = sides[0] * options.get("feature_group_count", 1)
    make = lambda: kind(inputs, sides[1], kernel.shape[:-2], use_bias=False, rngs=nnx.Rngs(0), **options)  # noqa: E731
    layer = nnx.eval_shape(make)
    layer.kernel = nnx.Param(kernel)
    return layer


def seen(x, window, w):
    """What the window shows in three ways: the dot products, ‖p‖² of each group, the patches."""
    return convolve(window, x, w), patch_squares(x, window), window.patches(x)


def check(found, dot, square, w, groups):
    ours, squares, patches = (np.asarray(f) for f in found)
    np.testing.assert_array_equal(ours, dot)
    np.testing.assert_array_equal(squares.sum(-1, keepdims=True), square)
    by_group = np.stack(np.split(patches, groups, -1), -3)  # (b, places..., groups, k, in)
    np.testing.assert_array_equal(squares, (by_group**2).sum((-1, -2)))
    kernels = w.reshape(-1, w.shape[-2], groups, w.shape[-1] // groups)
    products = np.einsum("...gki,kigo->...go", by_group, kernels)
    np.testing.assert_array_equal(products.reshape(ours.shape), dot)


def test_convolutions_see_what_flax_sees(rng):
    xs = [whole(rng, 2, *sizes, 4) for sizes, *_ in CONVS]
    ws = [whole(rng, *kernel, 4 // groups, 4) for _, kernel, groups, _ in CONVS]

    def both(xs, ws):
        out = []
        for x, w, (_, kernel, groups, options) in zip(xs, ws, CONVS, strict=True):
            ones = jnp.ones((*kernel, 4, 1))
            dot = flax_layer(nnx.Conv, w, feature_group_count=groups, **options)(x)
            square = flax_layer(nnx.Conv, ones, **options)(x * x)
            out.append((seen(*conv_window(x, kernel, groups=groups, **options), w), dot, square))
        return out

    for w, case, result in zip(ws, CONVS, compiled(both, xs, ws), strict=True):
        check(*result, w, case[2])


def test_transposed_convolutions_see_what_flax_sees(rng):
    xs = [whole(rng, 2, *sizes, 3) for sizes, *_ in TRANSPOSED]
    ws = [whole(rng, *kernel, *((2, 3) if o.get("transpose_kernel") else (3, 2))) for _, kernel, o in TRANSPOSED]

    def window(x, kernel, options):
        options = dict(options)
        return transposed_window(x, kernel, mirrored=options.pop("transpose_kernel", False), **options)

    def both(xs, ws):
        out = []
        for x, w, (_, kernel, options) in zip(xs, ws, TRANSPOSED, strict=True):
            mirrored = options.get("transpose_kernel")
            ones = jnp.ones((*kernel, 1, 3) if mirrored else (*kernel, 3, 1))
            dot = flax_layer(nnx.ConvTranspose, w, **options)(x)
            square = flax_layer(nnx.ConvTranspose, ones, **options)(x * x)
            kernel_of_window = turned(w) if mirrored else w
            out.append((seen(*window(x, kernel, options), kernel_of_window), dot, square, kernel_of_window))
        return out

    for *result, w in compiled(both, xs, ws):
        check(*result, np.asarray(w), 1)


def test_a_transposed_convolution_is_the_transpose_of_the_convolution(rng):
    cases = [(6, 3, "SAME", 1), (6, 4, "SAME", 2), (7, 3, "VALID", 2), (6, 3, "CIRCULAR", 1), (6, 2, "SAME", 3)]
    cases = [(whole(rng, 1, n, 2), whole(rng, k, 2, 3), dict(padding=p, strides=s)) for n, k, p, s in cases]

    def both(x, w, options):
        def product(x):
            x, window = conv_window(x, w.shape[:-2], **options)
            return convolve(window, x, w)

        dot, back = jax.vjp(product, x)
        g = jnp.round(5 * jnp.sin(jnp.arange(dot.size, dtype=jnp.float32))).reshape(dot.shape)
        wide, window = transposed_window(g, w.shape[:-2], mirrored=True, **options)
        return back(g)[0], convolve(window, wide, turned(w))

    for transposed, ours in compiled(lambda: [both(*case) for case in cases]):
        np.testing.assert_array_equal(ours, transposed)


def test_negative_padding_takes_entries_off(rng):
    x, w = whole(rng, 2, 9, 3), whole(rng, 3, 3, 2)

    def both(x, w):
        cut = conv_window(x, (3,), padding=[(-2, 1)])
        same = conv_window(x[:, 2:], (3,), padding=[(0, 1)])
        dilated = conv_window(x, (3,), padding=[(-3, -1)], input_dilation=2)  # 17 places less 4
        zeros = jnp.zeros((2, 17, 3)).at[:, ::2].set(x)
        other = conv_window(zeros[:, 3:-1], (3,), padding="VALID")
        return [seen(*c, w) for c in (cut, same, dilated, other)]

    for a, b in zip(*[iter(compiled(both, x, w))] * 2, strict=True):
        for ours, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(ours, right)


X = jnp.ones((2, 5, 6, 3))
BAD = [
    (conv_window, dict(padding="SAME", input_dilation=(1, 2)), "'SAME' with an input_dilation; give it in numbers"),
    (conv_window, dict(padding="CAUSAL"), "'CAUSAL' with 2 spatial axes"),
    (conv_window, dict(padding="SIDEWAYS"), "'SIDEWAYS'; it must be one of SAME, VALID, CAUSAL"),
    (transposed_window, dict(padding="REFLECT"), "'REFLECT'; it must be one of SAME, VALID, CIRCULAR"),
    (conv_window, dict(padding=[1, 2, 3]), "each of the 2 spatial axes"),
    (conv_window, dict(padding=[(1, 2, 3), 1]), "each of the 2 spatial axes"),
    (conv_window, dict(padding="REFLECT", kernel_dilation=(5, 1)), r"larger than its padding"),
    (conv_window, dict(padding="VALID", kernel_dilation=(1, 3)), r"at least as large as the kernel"),
    (conv_window, dict(padding=[(-9, 0), 0]), r"at least as large as the kernel"),
    (conv_window, dict(strides=(1, 0)), r"strides is \(1, 0\)"),
    (conv_window, dict(strides=-1), "strides is -1"),
    (conv_window, dict(input_dilation=(1, 2, 3)), r"input_dilation is \(1, 2, 3\)"),
    (transposed_window, dict(kernel_dilation=(2,)), r"kernel_dilation is \(2,\)"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
def test_windows_that_do_not_exist_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(X, (3, 3), **options)
