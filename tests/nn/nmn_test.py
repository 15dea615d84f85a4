"""nmn's layers against ours with the same parameters; where nmn is wrong, both against the float64 reference."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from aether.kernels.normalization import Normalization
from aether.nn.attention import YatAttention
from aether.nn.conv import YatConv, YatConv1D, YatConv2D, YatConvTranspose, YatConvTranspose2D
from aether.nn.embed import YatEmbed
from aether.nn.nmn import from_nmn, to_nmn
from aether.nn.prototypes import KernelBank
from aether.nn.rnn import YatGRUCell
from aether.nn.yat import YatNMN
from tools import reference as ref

nmn = pytest.importorskip("nmn", reason="nmn is not installed: pip install -e '.[parity]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nmn.linen
    import nmn.nnx
    import nmn.torch

TOLERANCE = 2e-5
ZEROS = jax.nn.initializers.zeros
POSITIVE = {"alpha": (0.5, 2.0), "epsilon_param": (-2.0, 1.0)}
DRAW = np.random.default_rng(7)
X = DRAW.normal(size=(4, 3)).astype(np.float32)
X1, X2, X3 = (DRAW.normal(size=s).astype(np.float32) for s in ((2, 7, 4), (2, 6, 5, 4), (1, 4, 3, 4, 2)))
Q, KV = DRAW.normal(size=(2, 3, 8)).astype(np.float32), DRAW.normal(size=(2, 5, 8)).astype(np.float32)
MASK = DRAW.uniform(size=(2, 1, 3, 5)) < 0.6
MASK[..., 0] = True
CAUSAL = np.tril(np.ones((1, 1, 5, 5), bool))


def relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


class Theirs:
    """A layer of nmn with drawn parameters; `state` is what its users have, `run` gives its output."""

    def __init__(self, framework, name, args, options, rng, example=None, method="__call__"):
        self.framework, self.name, self.method = framework, name, method
        kind = getattr(getattr(nmn, framework), name)
        if framework == "nnx":
            start = {"embedding_init" if "Embed" in name else "kernel_init": ZEROS}
            self.layer = kind(*args, **start, **options, rngs=nnx.Rngs(0))
            state = nnx.to_flat_state(nnx.state(self.layer))
            shapes = {".".join(p): v.shape for p, v in state if type(v).__name__ in ("Param", "FrozenParam")}
        elif framework == "torch":
            self.layer = kind(*args, **options)
            shapes = {k: tuple(v.shape) for k, v in self.layer.state_dict().items()}
        else:
            self.layer = kind(*args, **options)
            made = jax.eval_shape(lambda *x: self.layer.init(jax.random.key(0), *x, method=method), *example)
            shapes = {k: v.shape for k, v in traverse_util.flatten_dict(made["params"], sep=".").items()}
        # No default may hide a parameter that is not carried over: not bias 0, not α = 1.
        self.flat = {
            k: (rng.uniform(*POSITIVE[k], s) if k in POSITIVE else rng.normal(size=s)).astype(np.float32)
            for k, s in shapes.items()
        }
        self.load(self.flat)

    def load(self, flat):
        """Overwrite the parameters with flat arrays, by the means that nmn's users have."""
        nested = traverse_util.unflatten_dict(flat, sep=".")
        if self.framework == "nnx":
            state = nnx.state(self.layer)
            nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, nested))
            nnx.update(self.layer, state)
            self.state = nnx.to_pure_dict(nnx.state(self.layer))
        elif self.framework == "torch":
            self.layer.load_state_dict({k: torch.tensor(v) for k, v in flat.items()})
            self.state = self.layer.state_dict()
        else:
            self.state = nested

    def run(self, *inputs, **options):
        """Return the output, channels last."""
        if self.framework == "linen":
            return self.layer.apply({"params": self.state}, *inputs, method=self.method, **options)
        call = self.layer.attend if self.method == "attend" else self.layer
        if self.framework == "nnx":
            return call(*inputs, **options)
        last = "Conv" in self.name
        with torch.no_grad():
            tensors = (torch.tensor(np.moveaxis(x, -1, 1).copy() if last else x) for x in inputs)
            y = call(*tensors, **{k: torch.tensor(v) for k, v in options.items()}).numpy()
        return np.moveaxis(y, 1, -1) if last else y


def numbers(pairs):
    """Return the outputs of [(theirs, ours)], functions of nothing, all that JAX can compile in one call."""

    @jax.jit
    def compiled():
        return [(None if their.framework == "torch" else run(), ours()) for their, run, ours in pairs]

    outputs = compiled()
    pairs_and_outputs = zip(pairs, outputs, strict=True)
    return [(run() if theirs is None else theirs, ours) for (_, run, _), (theirs, ours) in pairs_and_outputs]


def same_output(cases):
    """Assert equal outputs for [(theirs, ours, inputs, options)], and that parameters return as they went."""
    pairs = []
    for theirs, ours, inputs, options in cases:
        from_nmn(theirs.state, theirs.framework, ours)
        pairs.append(
            (
                theirs,
                lambda t=theirs, i=inputs, o=options: t.run(*i, **o),
                lambda t=theirs, m=ours, i=inputs, o=options: call(t, m, i, o),
            )
        )
    for (theirs, _, _, _), (their_y, our_y) in zip(cases, numbers(pairs), strict=True):
        error = relative(our_y, their_y)
        assert error <= TOLERANCE, f"{theirs.framework} {theirs.name}: off by {error:.1e}"
    for theirs, ours, _, _ in cases:
        there_and_back(theirs, ours)


def call(theirs, ours, inputs, options):
    if theirs.method == "attend":
        return ours.attend(*inputs)
    if isinstance(ours, YatAttention):
        return ours(*inputs[:2], **options)[0]
    return ours(*inputs, **options)


def there_and_back(theirs, ours):
    """Assert that nmn loads what `to_nmn` gives, and that it is what it had."""
    back = to_nmn(ours, theirs.framework)
    assert back.keys() == theirs.flat.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs.flat[name], err_msg=name)
    changed = {k: v + 1 for k, v in back.items()}
    theirs.load(changed)
    from_nmn(theirs.state, theirs.framework, ours)
    for name, value in to_nmn(ours, theirs.framework).items():
        np.testing.assert_array_equal(value, changed[name], err_msg=name)


UNITS = [
    ({}, "nnx torch linen"),
    (dict(use_bias=False), "nnx torch linen"),
    (dict(constant_bias=0.5), "nnx torch linen"),
    (dict(softplus_bias=True), "nnx torch"),
    (dict(scalar_bias=True, softplus_bias=True), "nnx torch"),
    (dict(use_alpha=False), "nnx torch linen"),
    (dict(constant_alpha=True), "nnx torch linen"),
    (dict(constant_alpha=2.0, epsilon=0.3), "nnx torch"),
    (dict(learnable_epsilon=True), "nnx torch linen"),
    (dict(weight_normalized=True, epsilon=0.1), "nnx torch linen"),
]
DENSE_ONLY = [
    (dict(scalar_bias=True), "nnx torch"),
    (dict(spherical=True, epsilon=0.1), "nnx torch linen"),
    (dict(freeze_kernel=True), "nnx torch linen"),
]


def renamed(options, names):
    return {names.get(k, k): v for k, v in options.items()}


@pytest.mark.parametrize("framework", ["nnx", "torch", "linen"])
def test_dense(rng, framework):
    cases = []
    for options, where in UNITS + DENSE_ONLY:
        if framework in where:
            args = (5,) if framework == "linen" else (3, 5)
            their_options = renamed(options, dict(use_bias="bias", use_alpha="alpha") if framework == "torch" else {})
            theirs = Theirs(framework, "YatNMN", args, their_options, rng, (X,))
            cases.append((theirs, YatNMN(3, 5, kernel_init=ZEROS, rngs=nnx.Rngs(0), **options), (X,), {}))
    same_output(cases)


@pytest.mark.parametrize("framework", ["nnx", "torch", "linen"])
def test_kernels_that_layers_share(rng, framework):
    """nmn keeps its banks in a global and stores the whole bank in each layer; ours is a module of its own."""
    bank = KernelBank((3, 8), kernel_init=ZEROS, rngs=nnx.Rngs(0))
    ours = YatNMN(3, 5, kernel_bank=bank, rngs=nnx.Rngs(0))
    if framework == "linen":
        with pytest.raises(ValueError, match="nmn.linen has no banks"):
            to_nmn(ours, framework)
        return
    options = dict(tie_kernel_bank=True, kernel_bank_size=8, kernel_bank_id=f"parity {framework}")
    same_output([(Theirs(framework, "YatNMN", (3, 5), options, rng), ours, (X,), {})])


NNX_CONVS = [
    (X1, dict(kernel_size=3, padding="CAUSAL", kernel_dilation=2)),
    (X1, dict(kernel_size=4, padding="CIRCULAR", strides=2)),
    (X1, dict(kernel_size=(3,), padding="REFLECT")),
    (X1, dict(kernel_size=(3,), padding=[(1, 2)], input_dilation=2)),
    (X2, dict(kernel_size=3, padding="SAME")),
    (X2, dict(kernel_size=(3, 2), padding="SAME", strides=2, feature_group_count=2, weight_normalized=True)),
    (X3, dict(kernel_size=(2, 3, 2), padding="VALID")),
]
NNX_TRANSPOSED = [
    (X1, dict(kernel_size=3, strides=(2,), padding="SAME")),
    (X1, dict(kernel_size=2, strides=(2,), padding="CIRCULAR")),
    (X2, dict(kernel_size=(3, 2), strides=(2, 2), padding="VALID", transpose_kernel=True)),
    (X2, dict(kernel_size=(3, 2), padding=[(2, 1), (0, 3)])),
    (X3, dict(kernel_size=(2, 3, 2), strides=(2, 1, 2))),
]


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_nnx(rng, transposed):
    name, kind = ("YatConvTranspose", YatConvTranspose) if transposed else ("YatConv", YatConv)
    geometries = NNX_TRANSPOSED if transposed else NNX_CONVS
    units = [o for o, _ in UNITS if not (transposed and "weight_normalized" in o)]
    cases = []
    for x, options in geometries + [(X1, dict(kernel_size=3) | o) for o in units]:
        theirs = Theirs("nnx", name, (x.shape[-1], 6), options, rng)
        ours = kind(x.shape[-1], 6, kernel_init=ZEROS, rngs=nnx.Rngs(0), **options)
        cases.append((theirs, ours, (x,), {}))
    same_output(cases)


TORCH_NAMES = dict(strides="stride", kernel_dilation="dilation", feature_group_count="groups", use_bias="bias")
TORCH_CONVS = [
    ("YatConv1D", X1, dict(kernel_size=3, padding=1, padding_mode="circular"), dict(padding="CIRCULAR")),
    ("YatConv1D", X1, dict(kernel_size=3, padding=1, padding_mode="reflect"), dict(padding="REFLECT")),
    ("YatConv2D", X2, dict(kernel_size=(3, 2), strides=(2, 1), kernel_dilation=(1, 2), feature_group_count=2), {}),
    ("YatConv3D", X3, dict(kernel_size=(2, 3, 2)), {}),
    ("YatConvTranspose1D", X1, dict(kernel_size=3, strides=2, padding=1, output_padding=1), dict(padding=[(1, 2)])),
    ("YatConvTranspose2D", X2, dict(kernel_size=(3, 2), kernel_dilation=(2, 1)), dict(padding=[(4, 4), (1, 1)])),
    (
        "YatConvTranspose2D",
        X2,
        dict(kernel_size=(3, 2)),
        dict(padding=[(2, 2), (1, 1)], transpose_kernel=True),
    ),
    ("YatConvTranspose3D", X3, dict(kernel_size=(2, 3, 2), strides=2), dict(padding=[(1, 1), (2, 2), (1, 1)])),
]


def test_convolutions_of_torch(rng):
    options_1d = [o for o, _ in UNITS]
    cases = [*TORCH_CONVS, *(("YatConv1D", X1, dict(kernel_size=3) | o, {}) for o in options_1d)]
    pad = dict(padding=[(2, 2)])
    cases += [("YatConvTranspose1D", X1, dict(kernel_size=3) | o, pad) for o in options_1d if len(o) < 2]
    built = []
    for name, x, options, extra in cases:
        theirs = Theirs("torch", name, (x.shape[-1], 6), renamed(options, TORCH_NAMES), rng)
        kept = {k: v for k, v in options.items() if k not in ("padding_mode", "output_padding")}
        kind = YatConvTranspose if "Transpose" in name else YatConv
        window = (kept.pop("kernel_size"),) if isinstance(options["kernel_size"], int) else kept.pop("kernel_size")
        ours_options = dict(padding="VALID") | kept | extra
        ours = kind(x.shape[-1], 6, window, kernel_init=ZEROS, rngs=nnx.Rngs(0), **ours_options)
        built.append((theirs, ours, (x,), {}))
    same_output(built)


LINEN_CONVS = [
    ("YatConv1D", X1, (3,), {}),
    ("YatConv2D", X2, (3, 2), dict(padding="SAME", strides=(2, 2))),
    ("YatConv2D", X2, (3, 2), dict(padding=[(2, 1), (0, 3)], kernel_dilation=(1, 2), feature_group_count=2)),
    ("YatConv3D", X3, (2, 3, 2), {}),
    ("YatConvTranspose2D", X2, (3, 2), dict(padding="SAME", strides=(2, 1))),
    ("YatConvTranspose3D", X3, (2, 3, 2), {}),
]


def test_convolutions_of_linen(rng):
    cases = list(LINEN_CONVS)
    for options, where in UNITS:
        if "linen" in where and not {"constant_alpha", "weight_normalized"} & options.keys():
            cases += [(name, X1, (3,), options) for name in ("YatConv1D", "YatConvTranspose1D")]
    built = []
    for name, x, window, options in cases:
        theirs = Theirs("linen", name, (6, window), options, rng, (x,))
        kind = YatConvTranspose if "Transpose" in name else YatConv
        options = dict(padding="VALID") | options
        ours = kind(x.shape[-1], 6, window, kernel_init=ZEROS, rngs=nnx.Rngs(0), **options)
        built.append((theirs, ours, (x,), {}))
    turned = YatConvTranspose(4, 6, (3,), transpose_kernel=True, padding="VALID", rngs=nnx.Rngs(0))
    built.append((Theirs("linen", "YatConvTranspose1D", (6, (3,)), {}, rng, (X1,)), turned, (X1,), {}))
    same_output(built)


EMBEDS = [
    {},
    dict(use_alpha=False),
    dict(constant_alpha=True),
    dict(constant_alpha=2.0),
    dict(learnable_epsilon=True),
    dict(spherical=True, epsilon=0.1),
]


def test_embeddings_attend(rng):
    cases = []
    for framework in ("nnx", "torch", "linen"):
        weight_normalized = [dict(weight_normalized=True, epsilon=0.1)] if framework == "linen" else []
        for options in EMBEDS + weight_normalized:
            if "learnable_epsilon" in options and framework != "nnx":
                continue
            theirs = Theirs(framework, "YatEmbed", (7, 3), options, rng, (X,), "attend")
            ours = YatEmbed(7, 3, embedding_init=ZEROS, rngs=nnx.Rngs(0), **options)
            cases.append((theirs, ours, (X,), {}))
    same_output(cases)


# Ours and theirs, where the names of the options differ.
NNX_ATTENTION = [
    ({}, {}),
    (dict(use_bias=False), dict(use_bias=False)),
    (dict(use_alpha=False), dict(use_alpha=False)),
    (dict(learnable_epsilon=True), dict(learnable_epsilon=True)),
    (dict(spherical=True, epsilon=0.1), dict(normalize_qk=True, epsilon=0.1)),
    (dict(normalization="softermax", power=2.0), dict(use_softermax=True, power=2.0)),
    (dict(qkv_features=12, out_features=10), dict(qkv_features=12, out_features=10)),
]
TORCH_ATTENTION = [
    ({}, {}),
    (dict(use_bias=False), dict(bias=False)),
    (dict(use_alpha=False), dict(use_alpha=False)),
    (dict(constant_alpha=2.0), dict(constant_alpha=2.0)),
    (dict(spherical=True, epsilon=0.1), dict(normalize_qk=True, epsilon=0.1)),
]
LINEN_ATTENTION = [
    ({}, {}),
    (dict(use_bias=False), dict(use_bias=False)),
    (dict(constant_alpha=True), dict(constant_alpha=True)),
    (dict(spherical=True, epsilon=0.1), dict(normalize_qk=True, epsilon=0.1)),
    (dict(normalization="l1", epsilon=0.01), dict(normalization="l1", epsilon=0.01)),
]
ROTARY = [
    ({}, {}),
    (dict(use_bias=True), dict(use_bias=True)),
    (dict(use_alpha=False, rope_theta=100.0), dict(use_alpha=False, theta=100.0)),
    (dict(learnable_epsilon=True), dict(learnable_epsilon=True)),
    (dict(normalization="softermax", power=2.0), dict(use_softermax=True, power=2.0)),
    (dict(normalization="l1", epsilon=0.01), dict(normalization="l1", epsilon=0.01)),
]


def ours_attention(**options):
    return YatAttention(8, 2, use_score_bias=False, rngs=nnx.Rngs(0), **options)


def test_attention(rng):
    cases = []
    for our_options, options in NNX_ATTENTION:
        theirs = Theirs("nnx", "MultiHeadAttention", (2, 8), options | dict(deterministic=True), rng)
        cases.append((theirs, ours_attention(**our_options), (Q, KV, KV), dict(mask=MASK)))
    for our_options, options in TORCH_ATTENTION:
        theirs = Theirs("torch", "MultiHeadYatAttention", (8, 2), options, rng)
        theirs.layer.eval()
        cases.append((theirs, ours_attention(**our_options), (Q, KV, KV), dict(mask=MASK)))
    for our_options, options in LINEN_ATTENTION:
        theirs = Theirs("linen", "MultiHeadAttention", (2,), options, rng, (Q, KV))
        cases.append((theirs, ours_attention(**our_options), (Q, KV, KV), dict(mask=MASK)))
    for our_options, options in ROTARY:
        our_options = dict(rope_theta=10000.0, use_bias=False) | our_options
        theirs = Theirs("nnx", "RotaryYatAttention", (8, 2), options | dict(max_seq_len=8), rng)
        cases.append((theirs, ours_attention(**our_options), (KV,), dict(mask=CAUSAL)))
    same_output(cases)


# Where nmn is wrong.


def only_ours(cases):
    """Assert for [(what, theirs, ours, exact, least)] that ours is the reference and nmn off by more than `least`."""
    for what, theirs, ours, exact, least in cases:
        error, their_error = relative(ours, exact), relative(theirs, exact)
        at = np.unravel_index(np.argmax(np.abs(np.asarray(theirs) - exact)), np.shape(exact))
        message = (
            f"{what}: exact {exact[at]:.6g}, ours {ours[at]:.6g} (all off by {error:.1e}), "
            f"nmn's {np.asarray(theirs)[at]:.6g} (off by {their_error:.1e}, expected more than {least})"
        )
        assert error <= TOLERANCE and their_error > least, message


def carried(theirs, ours):
    from_nmn(theirs.state, theirs.framework, ours)
    return theirs.flat


def test_near_a_prototype_nmn_loses_the_distance(rng):
    w = rng.normal(size=(768, 8))
    w = (10 * w / np.linalg.norm(w, axis=0)).astype(np.float32)
    x = (w.T + 1e-3 / np.sqrt(768) * rng.normal(size=(8, 768))).astype(np.float32)
    exact = np.diagonal(ref.yat(x, w))
    kernels = {"nnx": {"kernel": w}, "torch": {"weight": w.T}, "linen": {"kernel": w.T}}
    for framework, kernel in kernels.items():
        args = (8,) if framework == "linen" else (768, 8)
        theirs = Theirs(framework, "YatNMN", args, {"bias" if framework == "torch" else "use_bias": False}, rng, (x,))
        theirs.load(kernel | {"alpha": np.ones(1, np.float32)})
        ours = YatNMN(768, 8, use_bias=False, distance="exact", kernel_init=ZEROS, rngs=nnx.Rngs(0))
        from_nmn(theirs.state, framework, ours)
        [(their_y, our_y)] = numbers([(theirs, lambda t=theirs: t.run(x), lambda o=ours: o(x))])
        only_ours([(f"{framework}, x = w + noise", np.diagonal(their_y), np.diagonal(our_y), exact, 0.02)])


def test_at_zero_nmns_gradients_are_nan(rng):
    """Where unit vectors are made of vectors of zeros."""
    x = np.zeros((1, 3), np.float32)
    dense = Theirs("nnx", "YatNMN", (3, 5), dict(spherical=True), rng)
    our_dense = YatNMN(3, 5, spherical=True, kernel_init=ZEROS, rngs=nnx.Rngs(0))
    carried(dense, our_dense)
    table = Theirs("nnx", "YatEmbed", (7, 3), dict(spherical=True), rng, method="attend")
    our_table = YatEmbed(7, 3, spherical=True, embedding_init=ZEROS, rngs=nnx.Rngs(0))
    carried(table, our_table)
    q = np.zeros((1, 2, 8), np.float32)
    heads = Theirs("nnx", "MultiHeadAttention", (2, 8), dict(normalize_qk=True, use_bias=False), rng)
    our_heads = ours_attention(spherical=True, use_bias=False)
    carried(heads, our_heads)
    drawn = rng.normal(size=(3, 5)).astype(np.float32)
    drawn[:, 1] = 0
    normalized = Theirs("nnx", "YatNMN", (3, 5), dict(weight_normalized=True), rng)
    normalized.load(normalized.flat | {"kernel": drawn})
    our_normalized = YatNMN(3, 5, weight_normalized=True, kernel_init=ZEROS, rngs=nnx.Rngs(0))
    carried(normalized, our_normalized)

    def of_kernel(layer):
        graph, state = nnx.split(layer)
        return jax.grad(lambda s: nnx.merge(graph, s)(X).sum())(state)["kernel"][...]

    @jax.jit
    def gradients():
        return {
            "spherical": [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (dense.layer, our_dense)],
            "attend": [jax.grad(lambda x, f=f: f.attend(x).sum())(x) for f in (table.layer, our_table)],
            "queries": [
                jax.grad(lambda q: heads.layer(q, deterministic=True).sum())(q),
                jax.grad(lambda q: our_heads(q)[0].sum())(q),
            ],
            "a column of zeros": [of_kernel(normalized.layer), of_kernel(our_normalized)],
        }

    for what, (theirs, ours) in gradients().items():
        assert np.all(np.isfinite(ours)), f"{what}: ours {ours}"
        assert np.any(np.isnan(theirs)), f"{what}: nmn's {theirs}"


def test_circular_transposed_convolution_adds_ratios_in_nmn(rng):
    """Where windows overlap at the border nmn adds their responses; it is their dot products that add."""
    cases, pairs = [], []
    for x, window, strides in ((X1, (3,), (1,)), (X1, (5,), (2,)), (X2, (3, 2), (1, 1))):
        options = dict(strides=strides, padding="CIRCULAR")
        theirs = Theirs("nnx", "YatConvTranspose", (4, 6, window), options, rng)
        ours = YatConvTranspose(4, 6, window, kernel_init=ZEROS, rngs=nnx.Rngs(0), **options)
        p = carried(theirs, ours)
        exact = ref.yat_conv_transpose(x, p["kernel"], bias=p["bias"], alpha=p["alpha"], **options)
        cases.append((f"circular, {window} by {strides}", exact))
        pairs.append((theirs, lambda t=theirs, x=x: t.run(x), lambda o=ours, x=x: o(x)))
    only_ours([(w, t, o, e, 0.03) for (w, e), (t, o) in zip(cases, numbers(pairs), strict=True)])


def test_a_number_in_the_name_of_a_convolution_counts_its_axes():
    """nmn.nnx takes an integer kernel_size as one axis whatever the name says, nmn.linen takes none."""
    options = dict(kernel_init=ZEROS, rngs=nnx.Rngs(0))
    assert nmn.nnx.YatConv2D(4, 6, 3, **options).kernel.shape == (3, 4, 6)
    assert YatConv2D(4, 6, 3, **options).kernel.shape == (3, 3, 4, 6)
    assert YatConvTranspose2D(4, 6, 3, **options).kernel.shape == (3, 3, 4, 6)
    flax = nnx.Conv(4, 6, 3, **options).kernel.shape
    assert YatConv(4, 6, 3, **options).kernel.shape == YatConv1D(4, 6, 3, **options).kernel.shape == flax


def test_normalised_embeddings_are_not_after_training_in_nmn(rng):
    for framework in ("nnx", "torch"):
        options = dict(weight_normalized=True, epsilon=0.1)
        theirs = Theirs(framework, "YatEmbed", (7, 3), options, rng, method="attend")
        ours = YatEmbed(7, 3, embedding_init=ZEROS, rngs=nnx.Rngs(0), **options)
        p = carried(theirs, ours)
        exact = ref.attend(X, p["embedding"], alpha=p["alpha"], **options)
        only_ours([(f"{framework} attend", theirs.run(X), jax.jit(lambda o=ours: o.attend(X))(), exact, 0.1)])


def test_a_positive_start_is_ignored_by_linen():
    theirs = nmn.linen.YatNMN(5, positive_init=True).init(jax.random.key(0), X)["params"]["kernel"]
    ours = YatNMN(3, 5, positive_init=True, rngs=nnx.Rngs(0)).kernel[...]
    assert np.min(theirs) < 0 < np.min(ours), f"least entries: nmn's {np.min(theirs)}, ours {np.min(ours)}"


def attention_reference(p, inputs, *, theta=None, mask=None, **options):
    """The whole layer in float64, from parameters named as ours."""
    x = [np.asarray(i, np.float64) for i in (inputs[0], inputs[-1], inputs[-1])]
    names = ("query", "key", "value")
    q, k, v = (a @ p[f"{n}.kernel"] + p.get(f"{n}.bias", 0) for n, a in zip(names, x, strict=True))
    q, k, v = (a.reshape(*a.shape[:2], 2, -1) for a in (q, k, v))
    if theta:
        q, k = (ref.rotate(a, np.arange(a.shape[1]), theta) for a in (q, k))
    o = ref.yat_attention(q, k, v, mask=mask, **options)
    return o.reshape(*o.shape[:2], -1) @ p["out.kernel"] + p.get("out.bias", 0)


def our_parameters(layer):
    return {".".join(path): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(layer))}


WRONG_ATTENTION = [
    # framework, nmn's class, its arguments and options; ours beside these; by how much nmn is off at least
    ("nnx", "MultiHeadAttention", (2, 8), dict(constant_alpha=2.0), {}, 0.1),
    ("nnx", "RotaryYatAttention", (8, 2), dict(constant_alpha=2.0), dict(rope_theta=1e4, use_bias=False), 0.1),
    ("linen", "MultiHeadAttention", (2,), dict(spherical=True, epsilon=0.1), {}, 0.1),
    ("torch", "MultiHeadYatAttention", (8, 2), dict(spherical=True, epsilon=0.1), {}, 1e-3),
]


def test_attention_where_nmn_is_wrong(rng):
    """α outside instead of inside the scores (nnx); directions that are not (torch) or not at all (linen)."""
    cases, pairs = [], []
    for framework, name, args, options, extra, least in WRONG_ATTENTION:
        rotary = "rope_theta" in extra
        inputs = (KV,) if rotary else (Q, KV, KV)
        theirs = Theirs(framework, name, args, options, rng, (Q, KV))
        ours = ours_attention(**(options | extra))
        carried(theirs, ours)
        run = {"deterministic": True} if framework == "nnx" else {}
        p = our_parameters(ours)
        unit = dict(alpha=options.get("constant_alpha", p.get("alpha", 1.0)), epsilon=ours.epsilon)
        unit["spherical"] = ours.spherical
        exact = attention_reference(p, inputs, theta=ours.rope_theta, **unit)
        cases.append((f"{framework} {name} {options}", exact, least))
        pairs.append(
            (
                theirs,
                lambda t=theirs, i=inputs, r=run: t.run(*i, **r),
                lambda o=ours, i=inputs: o(*i[:2])[0],
            )
        )
    only_ours([(w, t, o, e, least) for (w, e, least), (t, o) in zip(cases, numbers(pairs), strict=True)])


def test_nmns_causal_flag_lets_the_future_through(rng):
    cases, pairs = [], []
    for name in ("softmax", "l1", "softermax"):
        options = dict(use_softermax=True) if name == "softermax" else dict(normalization=name)
        theirs = Theirs("nnx", "RotaryYatAttention", (8, 2), dict(causal=True, epsilon=0.1) | options, rng)
        ours = ours_attention(rope_theta=1e4, use_bias=False, epsilon=0.1, normalization=name)
        carried(theirs, ours)
        p = our_parameters(ours)
        score = dict(alpha=p["alpha"], epsilon=0.1, normalization=name, l1_epsilon=0.1 if name == "l1" else 1e-12)
        cases.append((f"causal {name}", attention_reference(p, (KV,), theta=1e4, mask=CAUSAL, **score)))
        pairs.append((theirs, lambda t=theirs: t.run(KV), lambda o=ours: o(KV, is_causal=True)[0]))
    only_ours([(w, t, o, e, 0.1) for (w, e), (t, o) in zip(cases, numbers(pairs), strict=True)])


def test_rows_that_see_nothing_keep_the_output_bias(rng):
    """Both make the attention zero; nmn then drops the bias of the output map too, ours keeps the map a map."""
    mask = MASK.copy()
    mask[0, 0, 1] = False
    theirs = Theirs("nnx", "MultiHeadAttention", (2, 8), dict(deterministic=True), rng)
    ours = ours_attention()
    p = carried(theirs, ours)
    [(their_y, our_y)] = numbers(
        [(theirs, lambda: theirs.run(Q, KV, KV, mask=mask), lambda: ours(Q, KV, mask=mask)[0])]
    )
    np.testing.assert_allclose(our_y[0, 1], p["out.bias"], rtol=1e-6)
    assert np.all(their_y[0, 1] == 0)
    assert relative(our_y[1], their_y[1]) <= TOLERANCE


def test_what_nmn_accepts_and_ours_refuses():
    nmn.nnx.YatNMN(3, 5, epsilon=float("nan"), kernel_init=ZEROS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="epsilon is nan"):
        YatNMN(3, 5, epsilon=float("nan"), kernel_init=ZEROS, rngs=nnx.Rngs(0))
    bank = dict(tie_kernel_bank=True, kernel_bank_size=4, kernel_bank_id="too small")
    assert nmn.nnx.YatNMN(3, 5, kernel_init=ZEROS, rngs=nnx.Rngs(0), **bank).kernel.shape == (3, 4)
    small = KernelBank((3, 4), kernel_init=ZEROS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"kernel_bank is \(3, 4\)"):
        YatNMN(3, 5, kernel_bank=small, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 2, 1, 2))
    weights = nmn.nnx.yat_attention_weights(x, x, normalization="L1")
    assert np.allclose(weights, 0.5) and np.allclose(np.sum(weights, -1), 1)
    with pytest.raises(ValueError, match="normalization"):
        Normalization("L1", 1.0, 1e-12).checked()


# Errors.


def test_states_that_do_not_fit_are_refused(rng):
    theirs = Theirs("torch", "YatNMN", (3, 5), {}, rng)
    layer = YatNMN(3, 5, learnable_epsilon=True, use_bias=False, kernel_init=ZEROS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lacks \['epsilon_param'\] and has \['bias'\]"):
        from_nmn(theirs.state, "torch", layer)
    with pytest.raises(ValueError, match=r"lacks \[\] and has \['bias'\]"):
        from_nmn(theirs.state, "torch", YatNMN(3, 5, use_bias=False, kernel_init=ZEROS, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"weight is \(5, 3\) in state and kernel is \(2, 5\) .* \(5, 2\) in nmn.torch"
    ):
        from_nmn(theirs.state, "torch", YatNMN(2, 5, kernel_init=ZEROS, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="framework is 'keras'; it must be one of nnx, torch, linen"):
        from_nmn(theirs.state, "keras", layer)
    constant = Theirs("nnx", "YatNMN", (3, 5), dict(constant_alpha=True), rng)
    with pytest.raises(ValueError, match="alpha is 1.41.* in state and 2.0 in the layer"):
        from_nmn(constant.state, "nnx", YatNMN(3, 5, constant_alpha=2.0, kernel_init=ZEROS, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="YatGRUCell; nmn has YatNMN"):
        to_nmn(YatGRUCell(3, 2, kernel_init=ZEROS, recurrent_kernel_init=ZEROS, rngs=nnx.Rngs(0)), "nnx")


def test_attention_that_nmn_cannot_hold_is_refused():
    heads = ours_attention()
    heads.alpha[...] = jnp.array([1.0, 2.0])
    with pytest.raises(ValueError, match="alpha is .*one number for all heads"):
        to_nmn(heads, "nnx")
    with pytest.raises(ValueError, match="nmn.torch has no rotary attention"):
        to_nmn(ours_attention(rope_theta=100.0), "torch")
