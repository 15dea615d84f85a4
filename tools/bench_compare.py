"""What the tables of `python -m tools.bench` share: contenders, what the compiler says of them, times, rows.

Within a table all are compiled first and then timed in turn, round after round, so that other work on the machine slows
them alike: the ratio is the median over the rounds of a contender's time to that of the first one in the same round.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench_where import Where

SAMPLE = 0.02  # seconds that a timed sample lasts at least: shorter calls are repeated
LONG = 1.0  # seconds of a call that what ran before it does not change
Row = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A compiled contender.

    `saved` are its `saved_bytes`, `beside` those without arguments; `start` puts random inputs on the device and
    returns a call of the program, whose results are to be waited for; `more` turns its milliseconds into further
    columns.
    """

    compiled: Any
    saved: int
    beside: int
    start: Callable[[], Callable[[], Any]]
    more: Callable[[float], Row] = lambda ms: {}


@dataclass(frozen=True)
class Contender:
    """A row to be: its name, and how it is compiled."""

    name: str
    compile: Callable[[Where], Program]


def of_module(name: str, make: Callable[[], Any], *inputs: Any, call: Callable[..., Any] | None = None) -> Contender:
    """Return the contender call(module, *inputs), which is differentiated by the module's parameters and the inputs.

    Args:
      name: of the row.
      make: returns the NNX module.
      *inputs: shapes.
      call: its own call by default.
    """
    import jax
    from flax import nnx

    def prepared() -> tuple[Callable[..., Any], Any]:
        graph, params, rest = nnx.split(make(), nnx.Param, ...)

        def f(params: Any, *inputs: Any) -> Any:
            own = jax.tree.map(lambda x: x, rest)  # new variables, as the call may set statistics
            module = nnx.merge(graph, params, own)
            return call(module, *inputs) if call else module(*inputs)

        return f, jax.eval_shape(lambda: params)

    return Contender(name, lambda where: compiled(*prepared(), inputs, where))


def of_function(name: str, f: Callable[..., Any], params: Any, *inputs: Any) -> Contender:
    """Return the contender f(params, *inputs), differentiated by all of these; they are given by their shapes."""
    return Contender(name, lambda where: compiled(f, params, inputs, where))


def compiled(f: Callable[..., Any], params: Any, inputs: Sequence[Any], where: Where) -> Program:
    """Compile one forward and backward pass: (params, inputs, cotangent) -> the value and all gradients."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = where.mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def both(params: Any, inputs: Any, g: Any) -> Any:
        y, back = jax.vjp(f, params, *inputs)
        return y, back(g)

    with jax.set_mesh(mesh):
        y = jax.eval_shape(f, params, *inputs)
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), (params, tuple(inputs), y)
        )
        program = jax.jit(both).lower(*shapes).compile()
        saved, beside = (saved_bytes(f, params, *inputs, given=given) for given in (True, False))

    def start() -> Callable[[], Any]:
        arrays = jax.jit(lambda key: drawn(*shapes, key), out_shardings=whole)(jax.random.key(0))
        return lambda: program(*arrays)

    return Program(program, saved, beside, start)


def drawn(params: Any, inputs: Any, g: Any, key: Any) -> Any:
    """Draw all three by their shapes: matrices that keep lengths, other parameters about 1/2, and the rest N(0, 1)."""
    import jax

    def parameter(s: Any, key: Any) -> Any:
        z = jax.random.normal(key, s.shape)
        return (z * s.shape[-2] ** -0.5 if len(s.shape) > 1 else 0.5 + 0.1 * z).astype(s.dtype)

    keys = iter(jax.random.split(key, len(jax.tree.leaves((params, inputs, g)))))
    params = jax.tree.map(lambda s: parameter(s, next(keys)), params)
    rest = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape).astype(s.dtype), (inputs, g))
    return params, *rest


def saved_bytes(f: Callable[..., Any], *args: Any, given: bool = True) -> int:
    """Return the bytes kept from forward to backward: the leaves of the function that `jax.vjp(f, *args)` returns.

    Arguments that it keeps are among them, parameters and inputs alike, unless `given` is False. An array counts once,
    be it kept twice or an argument as well: two leaves are one array if they are the same object while f is traced.
    """
    import jax

    def kept(*args: Any) -> list[Any]:
        leaves = [x for x in jax.tree.leaves(jax.vjp(f, *args)[1]) if hasattr(x, "dtype")]
        left_out = {id(x) for x in jax.tree.leaves(args) if not given}
        return list({id(x): x for x in leaves if id(x) not in left_out}.values())

    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(kept, *args))


def measured(title: str, contenders: Sequence[Contender], where: Where, rounds: int) -> list[Row]:
    """Return a row for each contender: what the compiler says, then the times of those that fit in the memory."""
    programs: list[tuple[Row, Program | None]] = []
    held = 0
    for k, contender in enumerate(contenders):
        say(f"{title}: compiling {k + 1} of {len(contenders)}, {contender.name}")
        row, program = described(contender, where)
        row = dict(table=title, name=contender.name, **row)
        need = held + row["memory_bytes"]
        if need > where.memory:
            what = "does not fit" if where.topology else "not run"
            row["note"] = f"{what}: needs {need / 2**30:.1f} GiB, and the limit is {where.memory / 2**30:.1f}"
            program = None
        elif not where.topology and program:
            held += row["argument_bytes"]
        programs.append((row, program))
    if where.topology:
        whole = [None if row.get("kernels") else row.get("cycles") for row, _ in programs]
        for (row, _), cycles in zip(programs, whole, strict=True):
            row["ratio"] = cycles / whole[0] if cycles and whole[0] else None  # none where cycles are missing
    else:
        add_times(title, programs, rounds)
    return [row for row, _ in programs]


def described(contender: Contender, where: Where) -> tuple[Row, Program | None]:
    """Compile a contender and return what its program says; the compiler of a TPU refuses what does not fit."""
    from aether.plan.memory import wanted

    try:
        program = contender.compile(where)
    except RuntimeError as error:
        said = wanted(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
        if said is None:
            raise
        return dict(memory_bytes=said[0]), None
    sizes = dict(saved_bytes=program.saved, beside_bytes=program.beside)
    return sizes | said_of(program.compiled, bool(where.topology)), program


def said_of(compiled: Any, cycles: bool) -> Row:
    """Return sizes and counts of a compiled program.

    `flops` are those of products and convolutions, loops times their trips, and `compiler_flops` XLA's own count of
    everything, with loop bodies once; `kernels` are custom calls, whose cycles nobody knows; what they
    state of themselves is part of `flops`, and apart in `kernel_flops` and `kernel_bytes`.
    """
    from aether.plan.counts import count
    from aether.plan.read import parse

    memory, counts = compiled.memory_analysis(), count(parse(compiled.as_text()))
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    row = dict(
        temp_bytes=temporary,
        argument_bytes=arguments,
        memory_bytes=arguments + results + temporary,
        flops=counts.flops,
        compiler_flops=compiled.cost_analysis().get("flops"),
        kernels=dict(counts.uncounted + counts.stated),
        kernel_flops=counts.kernel_flops or None,
        kernel_bytes=counts.kernel_bytes or None,
    )
    return row | (dict(cycles=counts.cycles, hbm_bytes=counts.hbm_bytes) if cycles else {})


def add_times(title: str, programs: Sequence[tuple[Row, Program | None]], rounds: int) -> None:
    """Time the programs in turn and add `ms`, `ratio` and what else they tell to their rows."""
    running = [(row, program, program.start()) for row, program in programs if program]
    calls = [call for *_, call in running]
    for call in calls:
        seconds(call)  # the first call of a program is none of its times
    lengths = [seconds(call) for call in calls]
    times = []
    for k in range(rounds if running else 0):
        begin = time.perf_counter()
        times.append([sample(call, length) for call, length in zip(calls, lengths, strict=True)])
        left = (rounds - 1 - k) * (time.perf_counter() - begin)
        say(f"{title}: round {k + 1} of {rounds}, about {left:.0f} s left")
    for row, _ in programs:
        row["ms"] = row["ratio"] = None
    first = running and running[0][0] is programs[0][0]
    for (row, program, _), column, ratio in zip(running, zip(*times, strict=True), ratios(times), strict=True):
        row["ms"] = 1e3 * statistics.median(column)
        row["ratio"] = ratio if first else None
        row.update(program.more(row["ms"]))


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Return how long a call takes until its results are there, the mean of `repeats` of them."""
    import jax

    begin = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / repeats


def sample(call: Callable[[], Any], length: float) -> float:
    """Time a call of about `length` seconds, a short one repeatedly, after one more that finds its memory again."""
    if length < LONG:
        seconds(call)
    return seconds(call, max(1, math.ceil(SAMPLE / length)))


def ratios(times: Sequence[Sequence[float]]) -> list[float]:
    """Return the median over the rounds (rows of `times`) of each contender's time by the first one's."""
    return [statistics.median(row[k] / row[0] for row in times) for k in range(len(times[0]) if times else 0)]


def nmn() -> Any:
    """Return the library to compare with, `nmn.nnx`, or None, and say so, where it is not installed."""
    try:
        import nmn.nnx
    except ImportError:
        say("nmn is not installed, so its rows are left out; pip install 'aether[parity]' brings it")
        return None
    return nmn.nnx


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)
