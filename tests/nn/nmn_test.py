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
            start = {} if "Attention" in name else {"embedding_init" if "Embed" in name else "kernel_init": ZEROS}
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
    return [(run() if theirs is None else theirs, ours) for (_, run, _), (theirs, ours) in zip(pairs, outputs)]  # noqa: B905


def same_output(cases):
    """Assert equal outputs for [(theirs, ours, inputs, options)], and that parameters return as they went."""
    pairs = []
    for theirs, ours, inputs, options in cases:
        from_nmn(theirs.state, theirs.framework, ours)
        pairs.append(
            (
                theirs,
                lambda t=theirs, i=inputs, o=options: t.run(*i, **o),
                lambda t=theirs, l=ours, i=inputs, o=options: call(t, l, i, o),
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
WITHOUT = {("linen", "Conv"): {"constant_alpha", "weight_normalized"}, ("torch", "ConvT"): {"weight_normalized"}}


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
