"""Weak scaling: topologies by number, batches that grow with them, and the verdict on made-up rows."""

import pytest

from aether.chips import topology
from aether.errors import InputError
from aether.plan import scaling
from aether.plan.report import scaling_text
from aether.plan.scaling import verdict, weak_scaling
from aether.plan.sizes import sizes, topology_of
from aether.testing import tiny_config


def test_numbers_of_chips_become_compact_slices():
    assert sizes("16, 64,256") == [16, 64, 256]
    names = [str(topology_of("v5e", n)) for n in (1, 16, 256, 1024)]
    assert names == ["v5e:1x1", "v5e:4x4", "v5e:16x16", "4 x v5e:16x16"]
    assert [str(topology_of("v5p", n)) for n in (16, 64, 1024)] == ["v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x16"]
    assert str(topology_of("h100", 16)) == "2 x h100:8"


def test_the_batch_grows_with_the_chips(monkeypatch):
    planned = []
    monkeypatch.setattr(scaling, "make_plan", lambda config, target: planned.append(config.data.batch_size))
    targets = [topology("v5e:2x2"), topology("v5e:4x4")]
    weak_scaling(tiny_config(data=dict(batch_size=12)), targets, lambda plan: None)
    assert planned == [12, 48]
    with pytest.raises(InputError, match="multiple of 4"):
        weak_scaling(tiny_config(data=dict(batch_size=5)), [topology("v5e:2x2"), topology("h100:2")], lambda plan: None)


def line(chips, unit="tokens", **milliseconds):
    times = {k: milliseconds.get(k, 0) / 1e3 for k in ("compute", "hbm", "ici", "dcn")}
    limit = max(times, key=lambda k: times[k])
    return dict(
        **dict(chips=chips, seconds=times, limited_by=limit, unit=unit),
        **{f"{unit}_per_second_per_chip": 1 / times[limit], f"{unit}_per_chip": 2048},
        **dict(hbm_bytes=2**30, ici_bytes=0, dcn_bytes=0, mesh=dict(data=chips), batch_size=chips),
        mfu_bound=0.5,
    )


def test_the_verdict_names_where_it_stops_and_why():
    rows = [line(16, compute=100, ici=50), line(64, compute=80, ici=70), line(256, compute=80, dcn=90, ici=70)]
    assert verdict(rows).startswith("It stops scaling at 256 chips, where a chip makes 89% of what it does on 64: dcn")
    assert "90.0 ms a step, and took 0.0 ms" in verdict(rows)


def test_the_verdict_says_how_far_it_is_from_stopping():
    text = verdict([line(16, compute=100, ici=50), line(64, compute=100, ici=50)])
    assert text.endswith("ici would be the limit below about 1024 tokens a chip (now 2048).")
    assert "64 chips, where compute is the limit" in text
    images = verdict([line(n, "images", compute=100, ici=50) for n in (16, 64)])
    assert images == text.replace("tokens", "images")


def test_what_does_not_fit_is_a_verdict_and_a_row():
    refused = line(16, compute=1) | dict(seconds=None, limited_by=None, tokens_per_second_per_chip=None)
    assert verdict([refused]) == "At 16 chips it does not fit: 1.00 GiB a device."
    lines = scaling_text([refused, line(64, compute=80)]).splitlines()
    assert lines[1].endswith("does not fit") and "80.0*" in lines[2] and max(map(len, lines)) <= 100
