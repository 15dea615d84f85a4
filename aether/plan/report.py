"""A plan as JSON and as text of 100 columns."""

import textwrap
from dataclasses import asdict
from typing import Any

from aether.config import Config
from aether.plan.collectives import Collective
from aether.plan.measure import Plan
from aether.plan.search import Search

WIDTH = 100
SHOWN = 14  # collectives in the text


def to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values; what could not be found out is None."""
    c, counts, times = plan.config, plan.counts, plan.roofline
    return {
        "fits": plan.fits,
        "hbm_bytes": plan.memory.to_json(),
        "hbm_usable": plan.topology.chip.usable,
        "host_bytes": plan.memory.host,
        "flops": counts.flops if counts else None,
        "cycles": counts.cycles if counts else None,
        "hbm_traffic": counts.hbm_bytes if counts else None,
        "collectives": [collective_json(x) for x in plan.collectives],
        "mfu_bound": plan.mfu_bound,
        f"{c.unit}_per_second_bound": plan.rate_bound,
        "compile_seconds": plan.compile_seconds,
        "topology": str(plan.topology),
        "chips": plan.topology.chips,
        "devices_per_chip": plan.topology.chip.devices,
        "mesh": plan.mesh,
        "batch_size": c.data.batch_size,
        **(dict(context=c.data.context, vocab=c.model.vocab) if c.unit == "tokens" else dict(image_size=c.image.size)),
        "remat": c.model.remat,
        f"model_flops_per_{c.unit[:-1]}": plan.model_flops // c.per_step,
        "roofline_seconds": asdict(times) | {"bound": times.bound, "serial": times.serial} if times else None,
        "limited_by": times.limited_by if times else None,
        "warnings": plan.warnings,
    }


def collective_json(c: Collective) -> dict[str, Any]:
    """Return a collective as plain values."""
    return asdict(c) | {"axes": list(c.axes), "torus": list(c.torus)}


def to_text(plan: Plan) -> str:
    """Return a plan for people."""
    c, t, chip = plan.config, plan.topology, plan.topology.chip
    mesh = " x ".join(f"{k} {v}" for k, v in plan.mesh.items() if v > 1) or "one device"
    lines = [
        f"{c.model.kind} {c.model.size}, {_shape(c)}, remat {c.model.remat}",
        f"{t}, {t.chips} chips; mesh {mesh}; batch {_batch(c)}; compiled in {plan.compile_seconds:.1f} s",
        "",
        f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {size(plan.memory.total)} of {size(chip.usable)} a device",
    ]
    lines += [f"  {name:<12}{size(value):>12}" for name, value in plan.memory.to_json().items() if name != "total"]
    if plan.memory.host:
        lines.append(f"  {'host memory':<12}{size(plan.memory.host):>12}")
    if plan.counts and plan.roofline:
        lines += ["", *_times(plan), "", *_collectives(plan.collectives)]
    notes = [textwrap.fill(f"note: {w}", WIDTH, subsequent_indent="  ", break_on_hyphens=False) for w in plan.warnings]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _shape(c: Config) -> str:
    if c.unit == "tokens":
        return f"{c.model.layers} layers, vocabulary {c.model.vocab}"
    depth = f"{c.model.layers} layers" if c.model.layers else f"stages {c.model.stages}"
    return f"{depth}, {c.model.classes} classes"


def _batch(c: Config) -> str:
    size = f"{c.data.context} tokens" if c.unit == "tokens" else f"{c.image.size} x {c.image.size} pixels"
    return f"{c.data.batch_size} x {size}"


def _times(plan: Plan) -> list[str]:
    counts, times = plan.counts, plan.roofline
    assert counts and times
    chip = plan.topology.chip
    ici, dcn = (sum(c.bytes for c in plan.collectives if c.link == link) for link in ("ici", "dcn"))
    rows = [
        ("compute", times.compute, f"{counts.flops:.3e} FLOPs at {chip.peak / chip.devices:.3g} FLOP/s"),
        ("ici", times.ici, f"{size(ici)} received a device"),
        ("dcn", times.dcn, f"{size(dcn)} received a device"),
    ]
    if counts.hbm_bytes is not None:
        speed = chip.hbm_bandwidth / chip.devices / 1e9
        rows.insert(1, ("hbm", times.hbm, f"{size(counts.hbm_bytes)} at {speed:.0f} GB/s"))
    lines = ["A step takes at least (a device):"]
    lines += [
        f"  {name:<12}{1e3 * s:>10.2f} ms   {what}{'   <- the limit' if name == times.limited_by else ''}"
        for name, s, what in rows
    ]
    if counts.cycles is not None:
        clock = f"{1e3 * times.cycles:>10.2f} ms" if times.cycles is not None else f"{'':>13}"
        lines.append(f"  {'cycles':<12}{clock}   {counts.cycles:,} by the compiler's estimate, without collectives")
    rate, mfu, unit = plan.rate_bound, plan.mfu_bound, plan.config.unit
    if rate and mfu is not None:
        serial = plan.config.per_step / times.serial
        lines.append(
            f"At most {rate:,.0f} {unit}/s, MFU {mfu:.1%}; {serial:,.0f} {unit}/s, MFU {mfu * serial / rate:.1%} "
            "with nothing hidden"
        )
    return lines


def _collectives(found: list[Collective]) -> list[str]:
    if not found:
        return ["No collectives."]
    lines = [
        "Collectives, by what a device receives in a step:",
        f"  {'kind':<19}{'axes':<10}{'link':<5}{'of':>4}{'runs':>6}{'largest':>12}{'a step':>12}  {'when':<10}whose",
    ]
    for c in found[:SHOWN]:
        whose = c.parameter.removeprefix("blocks/").removesuffix("/kernel") or c.source
        lines.append(
            f"  {c.kind:<19}{','.join(c.axes) or '-':<10}{c.link:<5}{c.group:>4}{c.count:>6}"
            f"{size(max(c.operand, c.result)):>12}{size(c.bytes):>12}  {c.phase:<10}{whose}".rstrip()
        )
    rest = found[SHOWN:]
    if rest:
        lines.append(f"  and {len(rest)} smaller ones, {size(sum(c.bytes for c in rest))} (--json lists them)")
    return lines


def search_json(found: Search) -> dict[str, Any]:
    """Return a search as plain values: the frontier's plans without their collectives, and what was left out."""
    plans = [{k: v for k, v in to_json(p).items() if k != "collectives"} for p in found.frontier()]
    return {"frontier": plans, "compiled": len(found.plans), "left_out": dict(found.pruned)}


def search_text(found: Search) -> str:
    """Return the frontier of a search as a table, the fastest first."""
    rate = f"{found.plans[0].config.unit}/s" if found.plans else ""
    lines = [f"  {'batch':>7} {'remat':<8}{'data':>5}{'fsdp':>5}{'tensor':>7}{'HBM':>12}{rate:>14}{'MFU':>7}  limit"]
    for p in found.frontier():
        m = p.mesh
        lines.append(
            f"  {p.config.data.batch_size:>7} {p.config.model.remat:<8}{m['data']:>5}{m['fsdp']:>5}{m['tensor']:>7}"
            f"{size(p.memory.total):>12}{p.rate_bound:>14,.0f}{p.mfu_bound:>7.1%}  "
            f"{p.roofline.limited_by if p.roofline else ''}"
        )
    if len(lines) == 1:
        lines = ["Nothing that was tried fits."]
    fitting = sum(p.fits for p in found.plans)
    lines.append(
        f"{len(found.plans)} compiled, of which {fitting} fit and {len(found.frontier())} are not beaten in both"
    )
    lines += [f"left out: {n} {reason}" for reason, n in found.pruned.most_common()]
    return "\n".join(lines)


def scaling_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `aether.plan.scaling` as a table, bytes and times a device."""
    lines = [
        f"{'chips':>6} {'mesh':<11}{'batch':>7}{'HBM':>11}{'ICI':>11}{'DCN':>11}  "
        f"{'compute':>7}{'hbm':>7}{'ici':>7}{'dcn':>7} ms {'MFU':>6}"
    ]
    for r in rows:
        mesh = " ".join(f"{axis[0]}{n}" for axis, n in r["mesh"].items() if n > 1) or "-"
        times = r["seconds"]
        ends = "does not fit"
        if times:
            shown = (f"{1e3 * times[k]:.1f}" + ("*" if k == r["limited_by"] else "") for k in times)
            ends = "".join(f"{text:>7}" for text in shown) + f"    {r['mfu_bound']:>6.1%}"
        lines.append(
            f"{r['chips']:>6} {mesh:<11}{r['batch_size']:>7}{size(r['hbm_bytes']):>11}{size(r['ici_bytes']):>11}"
            f"{size(r['dcn_bytes']):>11}  {ends}"
        )
    return "\n".join(lines)


def size(n: float) -> str:
    """Write bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"
