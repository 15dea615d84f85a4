"""Measure what the README claims about speed; each figure is printed with what it is to be compared with.

python -m tools.bench --what=dense      ⵟ → Linear against LayerNorm → Linear → GELU → Linear, and nmn's layer
python -m tools.bench --what=conv       ⵟ-convolution against Conv → BatchNorm → ReLU, and nmn's
python -m tools.bench --what=attention  ⵟ-attention against dot-product attention, and nmn's, by length
python -m tools.bench --what=linear     linear attention against both, by length
python -m tools.bench --what=step       the whole training step of AetherGPT and GPT-2, by size; with --config=FILE that
                                        of any network and of its baseline
python -m tools.bench                   all of these: forward and backward, time, memory, operations; --json for JSON
  --compile_only=v5e:2x2                cycles, memory and traffic by that TPU's compiler instead of times; needs no TPU
  --backend=cpu|gpu|tpu                 which of this machine's devices

python -m tools.bench --what=loop       the training loop against the bare jitted step on the same batches
python -m tools.bench --what=startup    from the command to the first step of the quickstart, cold and warm
python -m tools.bench --what=reader     tokens a second of the data reader alone
python -m tools.bench --what=images     images a second of reading, decoding and augmenting, in one process; with
                                        --config=FILE of its loader, and of the step that it feeds
python -m tools.bench --what=evaluate   tokens a second of the task `documents` against the bare forward pass
python -m tools.bench --what=decode     decoding with the key/value cache against recomputing
python -m tools.bench --what=layers     each ⵟ layer against the usual one: operations, bytes kept for backward, time
python -m tools.bench --what=lazy       a ⵟ-MLP at its k nearest prototypes: error, bound, time by the dense one's
python -m tools.bench --what=telemetry  a look at what the ⵟ units do against a training step: time, products; with
                                        --compile_only of aether_124m, with --config=FILE of any
python -m tools.bench --what=save       what the steps lose to a save in the background, by ways to copy the state

The rows of the README's table, each by one command:

python -m tools.bench --what=dense --compile_only=v5e:2x2                                   cycles, bytes kept
python -m tools.bench --what=step --sizes=124m --compile_only=v5e:1x1 --config.model.attention_impl=blockwise
python -m tools.bench --what=attention --lengths=2048 --dtype=float32 --backend=cpu         nmn, XLA's dot product
python -m tools.bench --what=attention --lengths=4096,16384 --backend=gpu --only=auto       cuDNN
python -m tools.bench --what=step --sizes=350m --backend=gpu                                MFU
python -m tools.bench --what=conv --backend=cpu                                             BatchNorm
python -m tools.bench --what=step --config=configs/cifar10_resnet18.py --config.image.size=32 \\
    --config.model.classes=10 --compile_only=v5e:1x1                                        ResNet
python -m tools.bench --what=images --config=configs/digits.py --backend=cpu                loader, step

Ratios are to the first row of a table. `saved` are the bytes kept from forward to backward
(`tools.bench_compare.saved_bytes`), `temp` the program's scratch memory; FLOPs of products count loops by their trips.
A contender that needs more memory than there is (nine tenths of what is free, or --memory) is listed and not run.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from absl import flags

from aether.config import SIZES
from aether.errors import InputError
from launch import cli
from tools import (
    bench_attention,
    bench_conv,
    bench_dense,
    bench_evaluate,
    bench_images,
    bench_layers,
    bench_lazy,
    bench_linear,
    bench_save,
    bench_stack,
    bench_step,
    bench_telemetry,
)
from tools.bench_compare import measured
from tools.bench_table import table
from tools.bench_where import PLATFORMS, Where, absent, here, machine

TABLES: dict[str, Callable[..., Any]] = dict(
    dense=bench_dense.tables,
    conv=bench_conv.tables,
    attention=bench_attention.tables,
    linear=bench_linear.tables,
    step=bench_step.tables,
)
LINES: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = dict(
    loop=lambda args: iter([bench_stack.loop(args)]),
    startup=lambda args: iter([bench_stack.startup(args)]),
    reader=lambda args: iter([bench_stack.reader(args)]),
    images=bench_images.rows,
    evaluate=bench_evaluate.rows,
    decode=lambda args: iter([bench_stack.decode(args)]),
    layers=lambda args: bench_layers.rows(here(args.backend, args.memory), args.rounds),
    lazy=lambda args: bench_lazy.rows(args.rows or 256, args.width or 256, args.hidden or 4096, args.rounds),
    telemetry=lambda args: bench_telemetry.rows(args, device(args)),
    save=lambda args: bench_save.rows(args.mb, args.rounds),
)

FLAGS = cli.new_flags(config=True)
flags.DEFINE_list("what", ["all"], f"{', '.join([*TABLES, *LINES])}; all: the first {len(TABLES)}", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "interleaved rounds", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_enum("backend", None, list(PLATFORMS), "device to run on (JAX's choice by default)", flag_values=FLAGS)
flags.DEFINE_string("compile_only", "", "compile for one device of this TPU topology: v5e:2x2", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "print a JSON object a row instead of tables", flag_values=FLAGS)
flags.DEFINE_string("only", "", "regular expression of the rows wanted beside the first of a table", flag_values=FLAGS)
flags.DEFINE_float("memory", 0, "GiB that a row may need (0: 9/10 of the free ones)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "bfloat16 by default, on a CPU float32", flag_values=FLAGS)
flags.DEFINE_integer("rows", 0, "of x (dense; 0: 8192, on a CPU 1024)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_integer("width", 0, "of x (dense; 0: 768, on a CPU 256)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_integer("hidden", 0, "units (dense; 0: 4 x width)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_bool("biases", True, "linear maps have biases (dense)", flag_values=FLAGS)
flags.DEFINE_list("lengths", [], "of attention (512 ... 65536, on a CPU to 2048)", flag_values=FLAGS)
flags.DEFINE_integer("heads", 12, "of attention, each 64 wide", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_list("sizes", [], "of models (step; 124m, on a CPU tiny)", flag_values=FLAGS)
flags.DEFINE_integer(
    "batch", 0, "images (conv; 0: 256, on a CPU 32), rows (step; 0: 8, or the config's)", 0, flag_values=FLAGS
)
flags.DEFINE_integer("context", 0, "tokens a sequence (step; 0: the config's)", 0, flag_values=FLAGS)
flags.DEFINE_integer("steps", 100, "training steps a round (loop)", flag_values=FLAGS, lower_bound=20)
flags.DEFINE_integer("tokens", 100_000, "bytes of text (evaluate)", 1, flag_values=FLAGS)
flags.DEFINE_list("mb", ["10", "500"], "sizes of the state in MB (save)", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Print a table, or JSON lines, for everything that --what names."""
    options = checked(args)
    for name in (name for name in options.what if name in LINES):
        for row in LINES[name](options):
            print(json.dumps(row), flush=True)
    if names := [name for name in options.what if name in TABLES]:
        compare(names, options)


def checked(args: flags.FlagValues) -> SimpleNamespace:
    """Return the flags with lists of numbers in place of words.

    Raises:
      InputError: a word is none that the flag knows, or two flags exclude each other.
    """
    options = SimpleNamespace(**args.flag_values_dict())
    options.what = [name for word in args.what for name in (TABLES if word == "all" else [word])]
    for name in options.what:
        if name not in TABLES | LINES:
            raise InputError(f"--what is {name!r}; it takes some of {', '.join([*TABLES, *LINES])}, or all.")
    options.lengths, options.mb = numbers("lengths", args.lengths), numbers("mb", args.mb)
    for size in args.sizes:
        if size not in SIZES["gpt"]:
            raise InputError(f"--sizes has {size!r}; there are {', '.join(SIZES['gpt'])}.")
    if args.backend and args.compile_only:
        raise InputError("--backend and --compile_only are both given; give one of them.")
    try:
        options.only = re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only is {args.only!r}, which is no regular expression: {error}.") from None
    return options


def numbers(flag: str, words: list[str]) -> list[int]:
    """Return the whole numbers that a flag names."""
    if not all(word.isdecimal() and int(word) for word in words):
        raise InputError(f"--{flag} is {','.join(words)}; it takes whole numbers above 0, separated by commas.")
    return [int(word) for word in words]


def device(options: SimpleNamespace) -> Where:
    """Return the device that the flags name."""
    if options.compile_only:
        return absent(options.compile_only, options.memory, options.debug)
    return here(options.backend, options.memory)


def compare(names: list[str], options: SimpleNamespace) -> None:
    """Print the tables of these groups."""
    where = device(options)
    if not options.json:
        print(", ".join(f"{k} {v}" for k, v in machine(where).items() if v), flush=True)
    for name in names:
        for title, contenders in TABLES[name](options, where):
            chosen = [c for k, c in enumerate(contenders) if not k or options.only.search(c.name)]
            rows = measured(title, chosen, where, options.rounds)
            lines = (
                [json.dumps(row | machine(where), ensure_ascii=False) for row in rows]
                if options.json
                else [table(rows)]
            )
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
