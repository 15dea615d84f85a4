"""Decoding with the cache against recomputing everything for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig
from aether.generate.decode import CHUNK, Decoder
from aether.generate.sample import sample
from aether.models import GPT
from aether.parallel import make_mesh, shardings
from aether.testing import VOCAB, tiny_config

CONTEXT = 12
EOT = 0
VARIANTS = [("aether", "rotary"), ("aether", "learned"), ("gpt2", "learned"), ("gpt2", "rotary")]


class Case:
    """A model whose every part matters, its decoder, and the slow way to the same ids."""

    def __init__(self, kind: str, position: str, vocab: int = VOCAB, eot: int = EOT):
        config = tiny_config(kind, model=dict(position=position), data=dict(context=CONTEXT))
        self.graph, self.shapes = nnx.split(nnx.eval_shape(lambda: GPT(config.model, CONTEXT, nnx.Rngs(0))))
        rng = np.random.default_rng(5)
        # At birth a branch adds almost nothing to the stream, and a wrong cache would go unnoticed.
        self.params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), self.shapes)
        self.vocab, self.eot = vocab, eot
        # Warm enough for ids of all kinds, and cold enough that the logits decide.
        self.warm = 400.0 if kind == "aether" else 4.0  # about the spread of the logits
        self.decoder = Decoder(self.graph, CONTEXT, eot, vocab)
        self.next = jax.jit(self._next)

    def _next(self, params, ids, n, seed, token, settings):
        model = nnx.merge(self.graph, params)
        logits = model.logits(model(ids)[0][:, n - 1])[:, : self.vocab]
        rows = [jax.random.fold_in(jax.random.key(seed), row) for row in range(len(ids))]
        return sample(logits, jnp.stack([jax.random.fold_in(row, token) for row in rows]), **settings)

    def ids(self, prompt, n, params=None, **settings):
        """Return (rows, tokens)."""
        steps = self.decoder.stream(self.params if params is None else params, np.array(prompt, int), n, **settings)
        return np.array(list(steps)).T

    def slow(self, prompt, n, *, temperature=0.0, top_k=0, top_p=1.0, seed=0, num=1):
        """Recompute the whole window for each token."""
        ids, made = np.tile([self.eot, *prompt], (num, 1)), []
        for token in range(n):
            if ids.shape[1] > CONTEXT:
                ids = ids[:, -(CONTEXT // 2) :]
            length = ids.shape[1]
            padded = np.pad(ids, ((0, 0), (0, CONTEXT - length)))
            settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
            made.append(np.asarray(self.next(self.params, padded, length, seed, token, settings)))
            ids = np.concatenate([ids, made[-1][:, None]], 1)
            if (np.array(made) == self.eot).any(0).all():
                break
        rows = np.array(made).T
        ended = np.cumsum(rows == self.eot, 1) > 0
        rows = np.where(ended, -1, rows)
        return rows[:, : int((~ended).any(0).sum())] if (~ended).any() else np.zeros(0)


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def case(request):
    return Case(*request.param, vocab=VOCAB, eot=EOT)


@pytest.fixture(scope="module")
def endless():
    """A model that cannot draw its end of text."""
    return Case("aether", "rotary", vocab=VOCAB - 1, eot=VOCAB - 1)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 10, 11, 12, 30])
def test_equals_recomputing(case, length):
    prompt = np.random.default_rng(length).integers(1, VOCAB, length)
    for settings in (
        dict(temperature=0.0),
        dict(temperature=case.warm, seed=length),
    ):  # greedy ids soon repeat themselves
        assert case.ids(prompt, 40, **settings).tolist() == case.slow(prompt, 40, **settings).tolist()


@pytest.mark.parametrize("warmth", [0, 1])
def test_reaches_far_past_the_context(endless, warmth):
    settings = dict(temperature=warmth * endless.warm, num=2)
    ids = endless.ids([3, 1, 4], 5 * CONTEXT + 1, **settings)
    assert ids.shape == (2, 5 * CONTEXT + 1) and len(set(ids[0].tolist())) > 2
    assert ids.tolist() == endless.slow([3, 1, 4], 5 * CONTEXT + 1, **settings).tolist()


@pytest.mark.parametrize("case", VARIANTS[::2], ids="-".join, indirect=True)
def test_sampled_rows_equal_recomputing_and_end_at_end_of_text(case):
    settings = dict(temperature=2 * case.warm, top_k=30, top_p=0.98, seed=3, num=5)
    ids, expected = case.ids([2, 5], 60, **settings), case.slow([2, 5], 60, **settings)
    assert ids.tolist() == expected.tolist()
    assert ((ids == EOT).sum(), (ids == -1).any()) == (0, True)
    assert all((row[np.argmax(row < 0) :] < 0).all() for row in ids if (row < 0).any())
    assert (ids[:, -1] >= 0).any()


@pytest.mark.parametrize("n", [1, 2, CHUNK, CHUNK + 1, 50])
def test_makes_as_many_as_asked(endless, n):
    ids = endless.ids([1, 2, 3], n, num=2)
    assert ids.shape == (2, n) and ids.dtype == np.int32
    assert (ids >= 0).all() and (ids < VOCAB - 1).all()
    assert np.array_equal(ids, endless.ids([1, 2, 3], 50, num=2)[:, :n])


def test_the_seed_decides(endless):
    first, again, other = (endless.ids([4], 30, temperature=endless.warm, seed=s, num=2) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_a_row_is_the_same_in_any_number_of_rows(endless):
    settings = dict(temperature=endless.warm, seed=1)
    five = endless.ids([4, 4], 8, num=5, **settings)
    assert np.array_equal(endless.ids([4, 4], 8, num=2, **settings), five[:2])
    assert len({tuple(row) for row in five.tolist()}) == 5


def test_ids_above_the_vocabulary_are_never_drawn():
    few = Case("gpt2", "learned", vocab=3, eot=1)
    ids = few.ids([2], 9, temperature=5.0, num=20)
    assert set(np.unique(ids).tolist()) == {-1, 0, 2}


def test_parameters_come_with_each_call(endless):
    other = jax.tree.map(lambda p: p * 1.5, endless.params)
    before = endless.ids([1], 20, num=2)
    assert not np.array_equal(endless.ids([1], 20, params=other, num=2), before)
    assert np.array_equal(endless.ids([1], 20, num=2), before)


def test_prompts_and_settings_share_few_compilations(endless):
    def ask(lengths):
        for n in lengths:
            endless.ids(range(n), 3 + n, temperature=n / 10, top_k=n, top_p=1 - n / 50, seed=n, num=2)

    ask([1, 2, 4, 8, 10])  # with the end of text: every padded length, and past the context
    names = []

    def note(name, seconds, **_):
        names.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        ask(range(2 * CONTEXT))
        compiled = [name for name in names if "backend_compile" in name]
        jax.jit(lambda x: x + 1)(np.float32(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == [] and any("backend_compile" in name for name in names)


def test_tokens_come_before_the_end_is_known(endless):
    steps = endless.decoder.stream(endless.params, np.array([1]), 10**9, num=2)
    assert len([next(steps) for _ in range(20)]) == 20


def test_parameters_may_be_spread_over_a_mesh(endless):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    spread = jax.device_put(endless.params, shardings(endless.shapes, mesh))
    decoder = Decoder(endless.graph, CONTEXT, VOCAB - 1, VOCAB - 1, mesh)
    ids = np.array(list(decoder.stream(spread, np.array([3, 1, 4]), 8, temperature=0.0, num=2))).T
    assert ids.tolist() == endless.ids([3, 1, 4], 8, temperature=0.0, num=2).tolist()
