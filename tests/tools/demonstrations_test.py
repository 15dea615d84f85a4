"""The mathematics of the demonstrations, and each of their mains cut short."""

import io
import json
import re
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from aether.kernels.yat import yat
from launch import cli
from tools import reference
from tools.demonstrations import (
    conic_lift,
    decision_regions,
    digits,
    gradient_fields,
    migration,
    picture,
    xor,
    xor_landscape,
)
from tools.demonstrations.points import clusters, moons, rings
from tools.demonstrations.training import fit

ROOT = Path(__file__).parents[2]
MODULES = (conic_lift, decision_regions, digits, gradient_fields, migration, xor, xor_landscape)


def test_the_closed_form_solves_xor_exactly():
    assert np.asarray(xor.closed_form()(jnp.asarray(xor.POINTS)))[:, 0].tolist() == [0, 0, 2, 6]
    exact = reference.yat(xor.POINTS, [[1], [-1]], alpha=12, epsilon=1)[:, 0]
    assert exact.tolist() == [0, 0, 2, 6] and ((exact > xor.THRESHOLD) == xor.LABELS).all()


def test_no_line_gets_all_of_xor_right():
    """Sums over opposite corners are equal for every linear function, so that all four are never right."""
    right, w, threshold = xor.best_half_plane()
    assert right == 3 == np.sum((xor.POINTS @ w > threshold) == xor.LABELS)


@pytest.fixture(scope="module")
def trained():
    return xor.train(seed=1, steps=300, count=20)


def test_trained_units_that_count_as_solved_are(trained):
    _, params, responses = trained
    kernel, bias, alpha = (np.asarray(params[k][...], np.float64) for k in ("kernel", "bias", "alpha"))
    y = [
        reference.yat(xor.POINTS, k, bias=b, alpha=a, epsilon=1.0)[:, 0]
        for k, b, a in zip(kernel, bias, alpha, strict=True)
    ]
    np.testing.assert_allclose(responses, y, rtol=1e-3, atol=1e-5)
    right = xor.points_right(responses)
    assert right.tolist() == [sum((r > 1) == want for r, want in zip(row, (0, 0, 1, 1), strict=True)) for row in y]
    assert 10 <= np.sum(right == 4) < 20  # most starts, not every one


def fractions(rng, *shape):
    """Random numbers of which every sum and product is exact."""
    return np.vectorize(Fraction)(rng.integers(-20, 21, shape), rng.integers(1, 9, shape))


def test_a_level_is_a_plane_in_lifted_coordinates_exactly(rng):
    for w1, w2, b, x1, x2, c, epsilon in fractions(rng, 50, 7):
        c, epsilon = abs(c) + 1, abs(epsilon) + 1
        n, q = x1 * w1 + x2 * w2 + b, (x1 - w1) ** 2 + (x2 - w2) ** 2 + epsilon
        a = conic_lift.plane_of((w1, w2), b, epsilon, c)
        assert conic_lift.side(a, x1, x2) == n * n - c * q
        assert conic_lift.discriminant(a) == 4 * c * (w1 * w1 + w2 * w2 - c)


def test_the_plane_parts_what_the_unit_parts(rng):
    w, x = np.array([1.1, -0.4]), rng.normal(size=(500, 2)) * 2
    y = np.asarray(yat(jnp.float32(x), jnp.float32(w[:, None]), bias=0.3, epsilon=0.5))[:, 0]
    exact = reference.yat(x, w[:, None], bias=0.3, epsilon=0.5)[:, 0]
    for c in (0.1, 0.5, 2.0):
        above = conic_lift.side(conic_lift.plane_of(w, 0.3, 0.5, c), *x.T) > 0
        assert above.any() and (above == (exact > c)).all()
        assert (above == (y > c))[np.abs(exact / c - 1) > 1e-4].all()


def test_the_highest_response_is_where_it_is_said(rng):
    for w, b, epsilon in ((rng.normal(size=2), b, e) for b in (-0.4, 0.0, 1.5) for e in (0.1, 2.0)):
        peak, top = w + epsilon * w / (w @ w + b), conic_lift.highest(w, b, epsilon)
        np.testing.assert_allclose(reference.yat(peak, w[:, None], bias=b, epsilon=epsilon)[0], top, rtol=1e-12)
        around = peak + rng.normal(size=(2000, 2)) * rng.choice([0.01, 0.1, 1, 10], (2000, 1))
        assert reference.yat(around, w[:, None], bias=b, epsilon=epsilon).max() <= top


@pytest.mark.parametrize(
    ("b", "c", "name"),
    [
        (0, Fraction(1, 2), "hyperbola"),
        (0, Fraction(1), "parabola"),
        (0, Fraction(5, 2), "ellipse"),
        (0, Fraction(3), "point"),
        (0, Fraction(4), "nothing"),
        (-1, Fraction(1), "nothing"),
        (-1, Fraction(1, 2), "hyperbola"),
    ],
)
def test_names_of_conics(b, c, name):
    w, epsilon = (Fraction(4, 5), Fraction(3, 5)), Fraction(1, 2)
    assert conic_lift.classify(w, b, epsilon, c) == name
    line = np.linspace(-60, 60, 601)
    x = np.stack(np.meshgrid(line, line), -1)
    y = reference.yat(x, np.array([[0.8], [0.6]]), bias=b, epsilon=0.5)[..., 0]
    edge = (y > float(c))[[0, -1]].any() or (y > float(c))[:, [0, -1]].any()
    assert edge == (name in ("hyperbola", "parabola"))  # these alone are unbounded
    assert (y > float(c)).any() == (name not in ("point", "nothing"))


@pytest.mark.parametrize("name", gradient_fields.UNITS)
def test_gradients(rng, name):
    w, e = gradient_fields.PROTOTYPE.astype(np.float64), gradient_fields.EPSILON
    x = (rng.normal(size=(50, 2)) * 3).astype(np.float32)
    apart = x - w
    n, q = (x @ w)[:, None], np.sum(apart**2, 1, keepdims=True) + e
    formula = {
        "linear": np.broadcast_to(w, x.shape),
        "RBF": -apart / e * np.exp((e - q) / (2 * e)),
        "ⵟ": 2 * n / q * w - 2 * n**2 / q**2 * apart,
    }
    np.testing.assert_allclose(
        gradient_fields.gradients(gradient_fields.UNITS[name], x), formula[name], rtol=2e-5, atol=2e-6
    )


def test_the_bounds_of_the_gradient_hold_and_are_near(rng):
    """Found by random search, near to which they are; the bound everywhere is the larger one."""
    for b, epsilon in ((0.0, 0.5), (1.0, 0.1), (-0.5, 2.0)):
        w = rng.normal(size=2)
        r = np.geomspace(1e-3, 1e3, 400)[:, None]
        angle = np.linspace(0, 2 * np.pi, 180)
        apart = r[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        n, q = apart @ w + w @ w + b, r**2 + epsilon
        slope = (2 * n / q)[..., None] * w - (2 * n**2 / q**2)[..., None] * apart
        length, limit = np.linalg.norm(slope, axis=-1).max(1), gradient_fields.bound_at(r[:, 0], w, epsilon, b)
        everywhere = gradient_fields.bound(w, epsilon, b)
        assert (length <= limit * (1 + 1e-9)).all() and limit.max() <= everywhere <= 3 * limit.max()
        assert length.max() > limit.max() / 4


def test_where_a_unit_draws_its_input_towards_the_prototype(rng):
    """Where x·w > 0, but for the disc between the prototype and the peak w + εw/‖w‖²; behind the origin, away."""
    w, e = gradient_fields.PROTOTYPE.astype(np.float64), gradient_fields.EPSILON
    x = rng.uniform(-3, 3, (20_000, 2)).astype(np.float32)
    in_disc = np.linalg.norm(x - w - e * w / (2 * w @ w), axis=1) < e / (2 * np.linalg.norm(w))
    field = gradient_fields.gradients(gradient_fields.UNITS["ⵟ"], x)
    towards = np.sum(field * (w - x), 1) > 0
    assert in_disc.sum() > 20 and np.mean(towards == ((x @ w > 0) & ~in_disc)) > 0.9995  # the rest: on the edges
    assert gradient_fields.towards(x, field) == np.mean(towards)


def test_x_and_w_have_the_same_field_in_a_unit_without_bias(rng):
    x, w = (jnp.asarray(rng.normal(size=2), jnp.float32) for _ in range(2))
    for unit in gradient_fields.UNITS.values():
        np.testing.assert_allclose(jax.grad(unit, 1)(x, w), jax.grad(unit, 0)(w, x), rtol=1e-5)


def test_data():
    for draw, radii in ((lambda g, n: clusters(g, n, 6, 3, 2.5), (2.5,) * 3), (rings, (0.6, 2.0)), (moons, None)):
        x, labels = draw(np.random.default_rng(3), 6000)
        assert x.shape == (6000, 2) and x.dtype == np.float32 and np.ptp(np.bincount(labels)) == 0
        assert (x == draw(np.random.default_rng(3), 6000)[0]).all()
        means = np.stack([x[labels == k].mean(0) for k in np.unique(labels)])
        if radii is None:
            np.testing.assert_allclose(means[0], -means[1], atol=0.05)
            assert means[0, 1] > 0.3 and means[0, 0] < -0.5
        else:
            np.testing.assert_allclose(means, 0, atol=0.1)  # no linear score has anything to hold on to
            found = [np.median(np.linalg.norm(x[labels == k], axis=1)) for k in np.unique(labels)]
            np.testing.assert_allclose(found, radii, atol=0.06)


def test_descent():
    last, path = fit(lambda x: jnp.sum(x**2) / 2, jnp.array([1.0, -4.0]), 3, optax.sgd(0.5))
    assert path.tolist() == [[1, -4], [0.5, -2], [0.25, -1]] and last.tolist() == [0.125, -0.5]


def test_distances_to_the_nearest_point(rng):
    w, x = rng.normal(size=(2, 5)), rng.normal(size=(7, 2))
    slow = np.mean([min(np.linalg.norm(w[:, j] - p) for p in x) for j in range(5)])
    np.testing.assert_allclose(migration.nearest(np.stack([w, w + 100]), x)[0], slow)


def test_the_landscapes_lowest_places():
    """σ: constant ½. ReLU: (1, w₂ ≤ −1), three points exact. ⵟ: all four right, and better than both."""
    sigmoid, relu, unit = (
        lambda w, u=u: float(xor_landscape.loss(u, jnp.float32(w))) for u in xor_landscape.UNITS.values()
    )
    assert sigmoid([0.0, 0.0]) == 0.25 == relu([1.0, -1.0]) == relu([1.0, -3.0])
    y = reference.yat(xor.POINTS, [[0.42], [-0.6]], alpha=10.0, epsilon=1.0)[:, 0]
    np.testing.assert_allclose(unit([0.42, -0.6]), np.mean((y - xor.LABELS) ** 2), rtol=1e-4)
    assert unit([0.42, -0.6]) < 0.01
    paths, right = xor_landscape.descend(xor_landscape.UNITS["ReLU(x·w)"], np.array([[1.5, -2.0]], np.float32), 1000)
    np.testing.assert_allclose(paths[0, -1], [1.0, -2.0], atol=1e-3)
    assert right.tolist() == [3]


@pytest.fixture
def start(tmp_path, capsys, monkeypatch):
    """A function that runs a main on a small picture and returns the numbers that it prints."""

    def run(module, *argv, **constants):
        out = tmp_path / "new" / "picture.png"
        monkeypatch.setattr(picture, "DPI", 40)
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
        assert cli.run(module.main, module.FLAGS, module.__doc__, [f"--out={out}", *argv]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        image = Image.open(io.BytesIO(out.read_bytes()))
        assert image.format == "PNG" and image.width == 400 and len(image.convert("RGB").getcolors(2**24)) > 50
        return json.loads(line)

    return run


def test_xor_as_a_whole(start, trained):
    numbers = start(xor, train=lambda seed, steps, count: trained)
    assert numbers["closed_form"] == [0, 0, 2, 6] and numbers["linear_best"] == 3
    assert numbers["solved"] == numbers["right"][4] and sum(numbers["right"]) == numbers["starts"] == 20


def test_opposite_clusters_are_for_squares_not_for_lines(start):
    networks = {name: decision_regions.NETWORKS[name] for name in ("linear", "ⵟ")}
    data = {"opposite clusters": decision_regions.DATA["opposite clusters"]}
    found = start(decision_regions, "--steps=150", NETWORKS=networks, DATA=data, STARTS=3)["opposite clusters"]
    assert found["linear"]["best"] < 0.6 and found["ⵟ"]["worst"] > 0.85


def test_prototypes_move_on_to_the_data_and_linear_weights_past_it(start):
    found = start(migration, "--steps=1000", RADII=(1.7,), STARTS=4)["clusters at 1.7"]
    assert found["ⵟ"]["nearer"] == 4 and found["ⵟ"]["after"] < found["ⵟ"]["before"]
    assert found["linear"]["nearer"] == 0 and found["linear"]["after"] > found["linear"]["before"]
    assert min(found["ⵟ"]["accuracy"], found["linear"]["accuracy"]) > 0.95
    assert found["ⵟ"]["before"] == found["linear"]["before"]  # both start from the same vectors


def test_likeness_of_units_to_images_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    kernels = np.array([[[-1.0, 0.0], [0.0, 1.0]]])  # the negative of class 0's only image, and a multiple of class 1's
    mean, own, other = digits.likeness(kernels, x, np.array([0, 1, 1]))
    want = (1 + 3 / np.hypot(1.5, 3)) / 2  # class 1's mean image is (1.5, 3)
    np.testing.assert_allclose((mean, own, other), (want, 1.0, (0.6 + 0.0) / 2))
    row = digits.side_by_side(np.array([[2.0, 1.0]] * 4), (2, 2, 1))
    assert row.shape == (2, 4) and np.nanmax(np.abs(row)) == 1


def test_prototypes_that_start_as_digits_stay_digits(start):
    found = start(digits, "--steps=60")
    assert found["images"] == 1438 and found["yat_data"]["accuracy"] > 0.9
    assert found["yat_data"]["cosine_with_mean"] > 0.8 > 0.4 > found["linear"]["cosine_with_mean"]


def test_gradient_fields_as_a_whole(start):
    numbers = start(gradient_fields, REACH=3.0)
    assert numbers["ⵟ"]["longest"] < numbers["ⵟ"]["bound"] and numbers["RBF"]["towards"] == 1
    assert numbers["linear"]["longest"] == pytest.approx(1.25**0.5, rel=1e-3)


def test_conic_lift_as_a_whole(start):
    numbers = start(conic_lift, "--seed=2")
    kinds = {name: numbers[name]["discriminant"] for name in ("ellipse", "parabola", "hyperbola")}
    assert kinds["ellipse"] < 0 == kinds["parabola"] < kinds["hyperbola"]
    assert all(numbers[name]["agree"] == 10_000 for name in kinds)


def test_landscapes_as_a_whole(start):
    found = start(xor_landscape, "--steps=400", "--seed=1", STARTS=10)
    unit = found["10 (x·w)²/(‖x − w‖² + 1)"]
    assert unit["first"] == [0.42, -0.6] and unit["last"] == [-0.6, 0.42] and unit["places"] == 2
    assert unit["right"][4] >= 5 and found["ReLU(x·w)"]["right"][4] == found["sigmoid(x·w)"]["right"][4] == 0


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_the_page_shows_every_picture_and_its_command(module):
    name, page = module.__name__.split(".")[-1], (ROOT / "docs" / "demonstrations.md").read_text(encoding="utf-8")
    command = f"python -m tools.demonstrations.{name} --out=docs/demonstrations/{name}.png"
    assert command in page and command in module.__doc__
    assert re.search(rf"!\[.+\]\(demonstrations/{name}\.png\)", page)
    file = ROOT / "docs" / "demonstrations" / f"{name}.png"
    with Image.open(file) as image:
        assert file.stat().st_size < 250_000 and image.width == 1600


def test_without_a_place_for_the_picture(capsys):
    xor.FLAGS["out"].unparse()
    assert cli.run(xor.main, xor.FLAGS, xor.__doc__, ["--seed=1"]) == 2
    assert "--out is missing" in capsys.readouterr().err
