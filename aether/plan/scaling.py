"""Weak scaling on paper: one model and one batch a chip, over topologies that grow."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from aether.chips import Topology
from aether.config import Config
from aether.errors import InputError
from aether.plan.measure import Plan, make_plan

KEPT = 0.9  # of the best rate a chip so far; below it, scaling has stopped


def weak_scaling(config: Config, targets: Iterable[Topology], say: Callable[[Plan], None]) -> list[Plan]:
    """Plan a resolved config on each topology, `data.batch_size` being that of the first; `say` takes each plan."""
    plans: list[Plan] = []
    base: Topology | None = None
    for target in targets:
        base = base or target
        batch, rest = divmod(config.data.batch_size * target.chips, base.chips)
        if rest:
            raise InputError(
                f"data.batch_size is {config.data.batch_size} on {base.chips} chips; on {target.chips} it would not "
                f"be whole, so make it a multiple of {base.chips}."
            )
        data = dataclasses.replace(config.data, batch_size=batch)
        plans.append(make_plan(dataclasses.replace(config, data=data), target))
        say(plans[-1])
    return plans


def row(plan: Plan) -> dict[str, Any]:
    """Return a plan's line of the table, bytes and seconds a device."""
    sent = {link: sum(c.bytes for c in plan.collectives if c.link == link) for link in ("ici", "dcn")}
    times, rate, unit = plan.roofline, plan.rate_bound, plan.config.unit
    return {
        "chips": plan.topology.chips,
        "topology": str(plan.topology),
        "mesh": plan.mesh,
        "batch_size": plan.config.data.batch_size,
        "unit": unit,
        f"{unit}_per_chip": plan.config.per_step / plan.topology.chips,
        "fits": plan.fits,
        "hbm_bytes": plan.memory.total,
        "ici_bytes": sent["ici"],
        "dcn_bytes": sent["dcn"],
        "seconds": {k: getattr(times, k) for k in ("compute", "hbm", "ici", "dcn")} if times else None,
        "limited_by": times.limited_by if times else None,
        f"{unit}_per_second_bound": rate,
        f"{unit}_per_second_per_chip": rate / plan.topology.chips if rate else None,
        "mfu_bound": plan.mfu_bound,
        "compile_seconds": plan.compile_seconds,
    }


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say where scaling stops, and which resource it is; or how far the largest is from that.

    Collectives of parameters take as long for few tokens or images as for many, and the rest does not: below some
    number of them a chip they dominate.
    """
    best, unit = rows[0], rows[0]["unit"]
    for r in rows:
        if r["seconds"] is None:
            return f"At {r['chips']} chips it does not fit: {r['hbm_bytes'] / 2**30:.2f} GiB a device."
        rate, before = (x[f"{unit}_per_second_per_chip"] for x in (r, best))
        if rate < KEPT * before:
            name = r["limited_by"]
            return (
                f"It stops scaling at {r['chips']} chips, where a chip makes {rate / before:.0%} of what it does on "
                f"{best['chips']}: {name} takes {1e3 * r['seconds'][name]:.1f} ms a step, and took "
                f"{1e3 * best['seconds'][name]:.1f} ms."
            )
        best = r if rate > before else best
    last = rows[-1]
    times = last["seconds"]
    sending = max("ici", "dcn", key=lambda name: times[name])
    working = max(times["compute"], times["hbm"])
    text = f"It does not stop scaling up to {last['chips']} chips, where {last['limited_by']} is the limit"
    if sending == last["limited_by"] or not times[sending]:
        return f"{text}."
    now = last[f"{unit}_per_chip"]
    return (
        f"{text} and {sending} takes {1e3 * times[sending]:.1f} ms; {sending} would be the limit below about "
        f"{now * times[sending] / working:.0f} {unit} a chip (now {now:.0f})."
    )
