"""The schema: building, resolving, continuing, and what may change on resume."""

import dataclasses
import re

import pytest

from aether.config import AUTO, KINDS, SIZES, Config, Pictures, build, default_config, differences, knobs
from aether.config.kinds import OPEN
from aether.errors import InputError

FREE = (
    r"mesh\..*|checkpoint\..*|train\.(log_every|eval_every|eval_batches|steps|sample_.*|max_skipped|profile_steps)"
    r"|train\.(telemetry_\w*|explain|wandb)"
    r"|image\.strict|data\.(workers|prefetch|cache_dir|tfds_dir)|faults\.(?!spike_)\w*|model\.(remat|remat_names|scan_layers|attention_impl)"
)


def with_(**sections):
    return build(sections)


def test_every_knob_says_what_it_is():
    for key, f in knobs():
        assert len(f.metadata["doc"]) > 5 and not f.metadata["doc"].endswith("."), key
        assert f.type in (str, int, float, bool, dict[str, str], dict[str, float]), (
            key
        )  # no Optional: a flag cannot set None


def test_defaults_are_within_their_own_bounds():
    assert build(default_config()) == Config()


def test_the_keys_that_others_rely_on_exist():
    keys = {key for key, _ in knobs()}
    needed = """train.steps data.path data.batch_size model.size model.kind data.context data.validation train.seed
        train.log_every train.eval_every checkpoint.every optim.learning_rate train.init_from train.profile_steps"""
    assert set(needed.split()) <= keys
    assert Config().train.log_every == 1


def test_rates_are_grouped_in_aether_and_aether_vit():
    for kind, (family, _) in KINDS.items():
        made = with_(model=dict(kind=kind)).resolved(100, PICTURES if family in ("vit", "resnet") else None).optim
        assert made.rates == ("grouped" if kind in ("aether", "aether_vit") else "one"), kind
    rates = {size: with_(model=dict(size=size)).resolved(100).optim.learning_rate for size in SIZES["gpt"]}
    assert set(rates.values()) == {1e-2}, "the width decides what it becomes"
    one = with_(model=dict(size="124m"), optim=dict(rates="one")).resolved(100).optim
    assert one.learning_rate == pytest.approx(1.2e-3)
    with pytest.raises(InputError, match="optim.rates is grouped, which is for transformers, not for aether_resnet"):
        with_(model=dict(kind="aether_resnet"), optim=dict(rates="grouped")).resolved(0, PICTURES)


def test_what_may_change_on_resume_is_what_was_promised():
    for key, f in knobs():
        assert f.metadata["free"] == bool(re.fullmatch(FREE, key)), key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model=dict(widht=3)), "no key model.widht; did you mean model.width"),
        (dict(modle={}), "no key modle; did you mean model"),
        (dict(model=3), "model is 3; it takes a group of keys"),
        (dict(train=dict(steps="10")), r"train.steps is '10' \(str\); it takes a value of type int"),
        (dict(train=dict(steps=1.5)), "train.steps is 1.5"),
        (dict(train=dict(steps=True)), "train.steps is True"),
        (dict(model=dict(spherical=1)), "model.spherical is 1 .* type bool"),
        (dict(train=dict(steps=0)), "train.steps is 0; it takes a number at least 1"),
        (dict(model=dict(dropout=0.95)), "model.dropout is 0.95; it takes a number from 0.0 to 0.9"),
        (dict(optim=dict(learning_rate=float("nan"))), "optim.learning_rate is nan; it takes a finite number"),
        (dict(optim=dict(learning_rate=float("inf"))), "optim.learning_rate is inf"),
        (dict(model=dict(kind="llama")), "model.kind is 'llama'; it takes one of aether, gpt2, minibert"),
        (dict(optim=dict(lr_scale={"a": "b"})), r"optim.lr_scale.a is 'b' \(str\)"),
        (dict(data=dict(weights={"a": 1.0})), "data.weights names a"),
        (dict(data=dict(mixture={"a": "x"}, weights={"a": 0.0})), "data.weights.a is 0.0"),
        (dict(data=dict(validation={"train": "x"})), "data.validation.train is a reserved name"),
    ],
)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(InputError, match=message):
        build(values)


def test_an_int_is_a_float_where_one_is_asked_for():
    rate = with_(optim=dict(learning_rate=1, lr_scale={"a": 2})).optim
    assert type(rate.learning_rate) is float and type(rate.lr_scale["a"]) is float


PICTURES = Pictures(classes=10, size=32, channels=3, mean=0.5, std=0.25)


@pytest.mark.parametrize(("kind", "size"), [(k, s) for k, (family, _) in KINDS.items() for s in SIZES[family]])
def test_kind_and_size_decide_everything_left_open(kind, size):
    family, parts = KINDS[kind]
    images = family in ("vit", "resnet")
    config = with_(model=dict(kind=kind, size=size)).resolved(*((0, PICTURES) if images else (1000,)))
    for key, f in knobs():
        section, name = key.split(".")
        here = name in OPEN[family] if section == "model" and name != "size" else images or section != "image"
        assert (getattr(getattr(config, section), name) not in (0, AUTO)) or not (f.metadata["auto"] and here), key
    expected = {**SIZES[family][size], **parts, **(dict(classes=10) if images else dict(vocab=1000))}
    assert {k: getattr(config.model, k) for k in expected} == expected
    assert config.model.hidden == config.model.width * (1 if family == "resnet" else 4)
    assert config.optim.schedule_steps == config.train.steps and config.optim.learning_rate > 0
    assert config.resolved(*((0, PICTURES) if images else (1000,))) == config == config.resolved()


def test_a_family_is_of_its_first_size():
    assert (Config().resolved(10).model.size, Config().resolved(10).model.width) == ("tiny", 128)
    assert with_(model=dict(kind="resnet")).resolved(0, PICTURES).model.blocks == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("size", "patch", "stem"),
    [(8, 1, "cifar"), (28, 4, "cifar"), (32, 4, "cifar"), (64, 8, "cifar"), (96, 12, "cifar"), (224, 16, "imagenet")],
)
def test_patches_and_stems_follow_the_images(size, patch, stem):
    pictures = dataclasses.replace(PICTURES, size=size)
    assert with_(model=dict(kind="vit")).resolved(0, pictures).model.patch == patch
    assert with_(model=dict(kind="resnet")).resolved(0, pictures).model.stem == stem


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dict(kind="resnet", size="124m"),
            "model.size is '124m' and model.kind resnet; it takes one of 18, 34, 50, 101",
        ),
        (dict(kind="resnet", heads=3), "model.heads is 3, but resnet has no such part"),
        (dict(kind="aether_vit", stem="cifar"), "model.stem is 'cifar', but aether_vit has no such part"),
        (dict(kind="gpt2", head="yat"), "model.head is yat and model.kind gpt2; it takes one of tied, untied"),
        (dict(kind="vit", patch=5), "model.patch is 5, which does not divide the 32 .*; 1, 2, 4, 8, 16, 32 would"),
        (dict(kind="resnet", stages="2,x"), "model.stages is '2,x'; write the blocks"),
        (dict(kind="resnet", stages="2,0"), "model.stages is '2,0'; write the blocks"),
        (dict(kind="resnet", classes=5), "model.classes is 5 but the data have 10 classes"),
        (dict(kind="aether", attention="yat_linear"), "model.attention is yat_linear, which is for minibert"),
    ],
)
def test_parts_that_a_family_does_not_have_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        with_(model=model).resolved(0, PICTURES)


def test_what_a_task_has_no_use_for_is_refused():
    with pytest.raises(InputError, match="image.flip is True, but gpt2 reads text; set it to False"):
        with_(model=dict(kind="gpt2"), image=dict(flip=True)).resolved(10)
    with pytest.raises(InputError, match="data.mask_rate is 0.3, but aether fills in no masked text; set it to 0.15"):
        with_(model=dict(kind="aether"), data=dict(mask_rate=0.3)).resolved(32)
    assert with_(model=dict(kind="bert"), data=dict(mask_rate=0.3)).resolved(32).data.mask_rate == 0.3
    with pytest.raises(InputError, match="model.features is 64, which model.attention=yat_linear alone has"):
        with_(model=dict(kind="minibert", features=64)).resolved(32)
    with pytest.raises(InputError, match="train.z_loss is 0.1, which is for texts"):
        with_(model=dict(kind="resnet"), train=dict(z_loss=0.1)).resolved(0, PICTURES)


def test_the_images_own_size_and_statistics_fill_what_is_left_open():
    config = with_(model=dict(kind="resnet"), image=dict(size=16, std=0.5)).resolved(0, PICTURES)
    assert (config.image.size, config.image.channels, config.image.mean, config.image.std) == (16, 3, 0.5, 0.5)


def test_an_explicit_value_wins():
    given = dict(layers=3, hidden=10, vocab=2000, attention="dot", embed_std=0.5, head="tied")
    config = with_(model=given, optim=dict(learning_rate=0.5, schedule_steps=7)).resolved(1000)
    assert {k: getattr(config.model, k) for k in given} == given
    assert (config.optim.learning_rate, config.optim.schedule_steps, config.model.mlp) == (0.5, 7, "yat")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model=dict(width=10, heads=3)), "model.width is 10 and model.heads 3"),
        (dict(model=dict(width=6, heads=2)), "model.width / model.heads is 3; rotary"),
        (dict(model=dict(vocab=50)), "model.vocab is 50 but the tokenizer has 100"),
        (dict(data=dict(batch_size=6), train=dict(accumulate=4)), "data.batch_size is 6 and train.accumulate 4"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        build(values).resolved(100)
    if "width / " in message:
        build({"model": {**values["model"], "position": "learned"}}).resolved(100)  # only rotation needs pairs


def test_decay_of_norms_is_for_networks_that_have_units():
    for model in (dict(kind="gpt2"), dict(kind="aether", mlp="gelu"), dict(kind="resnet")):
        with pytest.raises(InputError, match=r"optim.rkhs_decay is 0.1, but this .* set it to 0, or .*aether_resnet"):
            with_(model=model, optim=dict(rkhs_decay=0.1)).resolved()
    for model in (dict(kind="aether"), dict(kind="gpt2", mlp="yat"), dict(kind="resnet", head="yat")):
        with_(model=model, optim=dict(rkhs_decay=0.1)).resolved()


def test_telemetry_is_for_networks_that_have_units_and_takes_rows_of_a_batch():
    for model in (dict(kind="gpt2"), dict(kind="aether", mlp="gelu", attention="dot"), dict(kind="resnet")):
        with pytest.raises(InputError, match=r"telemetry_every is 5, but this .* set it to 0, or .*aether_resnet"):
            with_(model=model, train=dict(telemetry_every=5)).resolved()
        with_(model=model).resolved()
    for model in (dict(kind="aether", mlp="gelu"), dict(kind="minibert"), dict(kind="resnet", head="yat")):
        with_(model=model, train=dict(telemetry_every=5)).resolved()
    few = dict(data=dict(batch_size=2), train=dict(telemetry_every=5, telemetry_rows=3))
    with pytest.raises(InputError, match=r"telemetry_rows is 3 and data.batch_size 2; .* at most 2\."):
        with_(**few).resolved()
    with_(**few | dict(train=dict(telemetry_rows=3))).resolved()


def test_points_are_what_units_compare():
    points = lambda **model: with_(model=model).resolved(100).optim.no_muon  # noqa: E731
    assert points(kind="aether") == r"mlp/hidden/kernel|attention/(query|key)/kernel"
    assert points(kind="gpt2") == points(mlp="gelu", attention="dot") == ""
    assert points(kind="gpt2", mlp="yat") == "mlp/hidden/kernel"
    assert with_(optim=dict(no_muon="")).resolved(100).optim.no_muon == ""
    assert with_(model=dict(kind="aether_resnet")).resolved(0, PICTURES).optim.no_muon == ""


def test_resolved_configs_survive_json():
    config = with_(optim=dict(lr_scale={"a": 2.0}), data=dict(validation={"v": "p"})).resolved(100)
    assert build(config.to_json()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = None


def test_continuing_takes_what_is_left_open_from_the_saved_run():
    saved = with_(train=dict(steps=100), optim=dict(learning_rate=0.1), model=dict(layers=3)).resolved(50)
    longer = with_(train=dict(steps=200)).continued(saved).resolved(50)
    assert (longer.train.steps, longer.optim.schedule_steps, longer.optim.learning_rate) == (200, 100, 0.1)
    assert (longer.model.layers, longer.model.vocab) == (3, 50)
    assert differences(saved, longer) == [("train.steps", 100, 200, True)]
    other = with_(train=dict(steps=100), optim=dict(learning_rate=0.2)).continued(saved).resolved(50)
    assert differences(saved, other) == [("optim.learning_rate", 0.1, 0.2, False)]
    wet = with_(model=dict(dropout=0.5)).resolved(50)
    assert with_(model=dict(dropout=0.0)).continued(wet).model.dropout == 0.0  # a 0 that means 0 is not left open


def test_differences_name_every_changed_knob():
    a, b = Config().resolved(10), with_(train=dict(seed=1, log_every=5), mesh=dict(data=2)).resolved(10)
    assert differences(a, a) == []
    changed = [("train.seed", 0, 1, False), ("train.log_every", 1, 5, True), ("mesh.data", -1, 2, True)]
    assert sorted(differences(a, b)) == sorted(changed)
