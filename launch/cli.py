"""What the mains share: flags, `--help`, exit codes, and the environment that must be set before JAX is imported."""

import difflib
import errno
import glob
import logging as standard_logging
import os
import re
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from absl import flags, logging

from aether.config import Config, knobs
from aether.errors import AetherError, InputError, Stopped, StorageError
from launch import overrides

HELP = {"-h", "-help", "--help", "-helpfull", "--helpfull", "-helpshort", "--helpshort"}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
OVERRIDE = "override"  # what `--config.KEY=VALUE` is rewritten to; nobody types it


def new_flags(*, config: bool = False) -> flags.FlagValues:
    """Return a set of flags for one main: `--debug`, and `--config` with its overrides if it takes one."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    if config:
        flags.DEFINE_string("config", "", "python file with get_config(), such as configs/quickstart.py", values)
        flags.DEFINE_multi_string(OVERRIDE, [], "", values)
    flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own logs", values)
    return values


def define_average(values: flags.FlagValues) -> None:
    """Define `--average` for a main that uses a trained model."""
    flags.DEFINE_string(
        "average",
        "auto",
        "which parameters: none (as trained), ema (their moving average), last:K (mean of the last K checkpoints), "
        "auto (ema where the run keeps one)",
        flag_values=values,
    )


def run(
    main: Callable[[flags.FlagValues], int | None],
    values: flags.FlagValues,
    doc: str,
    argv: list[str] | None = None,
    *,
    several: bool = False,
) -> int:
    """Parse `argv` (default: the command line) into `values`, call `main(values)`, and return the exit code.

    With `several` this may be one of several processes of a job, which end together.
    """
    argv = sys.argv[1:] if argv is None else argv
    if HELP & set(argv):
        print(help_text(values, doc))
        return 0
    debug = "--debug" in argv
    try:
        prepare_environment(debug)
        parse(values, argv)
        return main(values) or 0
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return 0
        text, code = describe(error, debug)
        if debug:
            traceback.print_exception(error)
        return end(text, code) if several else _print(text, code)


def parse(values: flags.FlagValues, argv: list[str]) -> None:
    """Set `values` to their defaults and parse `argv` into them; what does not fit is an `InputError`."""
    for name in values:
        values[name].unparse()
    if "config" in values:
        argv = list(_rewrite(argv))
    flags.FLAGS.mark_as_parsed()  # ours are in a set of their own, but Grain's worker processes read absl's global one
    try:
        rest = values(["launch", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname, values)) from None
    except flags.Error as error:
        raise InputError(_wrong_value(str(error), values)) from None
    if rest:
        raise InputError(f"{rest[0]!r} does not belong to a flag; write every value as --flag=value.")


def require(values: flags.FlagValues, name: str, example: str) -> str:
    """Return the flag `name`, or raise an `InputError` that shows how to give it."""
    value = getattr(values, name)
    if not value:
        raise InputError(f"--{name} is missing; give it, for example --{name}={example}.")
    return value


def named(text: str, flag: str) -> tuple[str, str]:
    """Split NAME:PATH, or raise an `InputError`."""
    name, _, path = text.partition(":")
    if not (name and path):
        raise InputError(f"--{flag} is {text!r}; give NAME:PATH, such as french:texts/french.txt.")
    return name, path


def config_of(values: flags.FlagValues) -> Config:
    """Return the checked config that `--config` and its overrides describe."""
    return overrides.make_config(require(values, "config", "configs/quickstart.py"), values.override)


def prepare_environment(debug: bool) -> None:
    """Turn on JAX's compilation cache and quieten the libraries; variables that are set already stay."""
    cache = Path(os.environ.get("AETHER_CACHE") or Path.home() / ".cache" / "aether")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if debug else "2")
    from aether.plan.machine import NO_TPU
    from aether.processes.cluster import TPU_FILES

    if not any(glob.glob(pattern) for pattern in TPU_FILES):  # libtpu may still be there, for `launch.plan`
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    logging.set_verbosity(logging.INFO if debug else logging.ERROR)
    if not debug:
        _quieten_writers()


def _quieten_writers() -> None:
    """Keep what Orbax's tasks leave behind after a failed save (a full disk) off the screen; the failure is told."""
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook


def describe(error: BaseException, debug: bool = False) -> tuple[str, int]:
    """Return what happened, in one line, and the exit code that goes with it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; of a run that trains, what came after its last checkpoint is not saved.", 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return f"error: {error.code}" if code != error.code else f"ended with exit code {code}.", code
    for cause in _causes(error):
        if isinstance(cause, Stopped):
            return str(cause), cause.exit_code
        if isinstance(cause, AetherError):
            return f"error: {cause}", cause.exit_code
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            where = f" ({cause.filename})" if cause.filename else ""
            return f"error: {cause.strerror}{where}; free some space or check the disk.", StorageError.exit_code
    what = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    kept = "" if debug else f"; the traceback is in {_keep_traceback(error)}, or run again with --debug"
    return f"unexpected error: {what}{kept}.", 1


def end(text: str, code: int) -> int:
    """Let the processes of a job end together: one of them prints, all have the same exit code."""
    from aether import processes

    return processes.end(text, code)


def help_text(values: flags.FlagValues, doc: str) -> str:
    """Return what `--help` prints: the main's docstring, its flags, and every knob of the config by section."""
    shown = [(f"--{f.name}", f.default, f.help) for f in (values[name] for name in values) if f.name != OVERRIDE]
    lines = [doc.strip(), "", "Flags (default in brackets):", *(_entry(*row) for row in shown)]
    if "config" in values:
        lines += [
            "",
            "The config: --config.KEY=VALUE changes a value of the file (defaults of the schema in brackets).",
        ]
        for section in fields(Config):
            lines += ["", f"{section.name}: {section.type.__doc__.splitlines()[0]}"]  # type: ignore[union-attr]
            lines += [_entry(k, f.default, _describe(k, f)) for k, f in knobs() if k.startswith(section.name + ".")]
    return "\n".join(lines)


def _describe(key: str, knob: Field[Any]) -> str:
    choices = f"; one of {', '.join(knob.metadata['choices'])}" if knob.metadata["choices"] else ""
    entries = f"; --config.{key}.NAME=VALUE" if str(knob.type).startswith("dict") else ""
    return knob.metadata["doc"] + choices + entries


def _entry(name: str, default: Any, doc: str) -> str:
    shown = "" if default in (None, "") or not isinstance(default, str | int | float) else f" [{default}]"
    shown = shown.lower() if isinstance(default, bool) else shown
    head = f"  {name}{shown}"
    gap = " " * (34 - len(head)) if len(head) < 33 else "\n" + " " * 34
    body = textwrap.wrap(doc, 86, break_on_hyphens=False)
    return head + gap + ("\n" + " " * 34).join(body)


def _rewrite(argv: list[str]) -> Iterator[str]:
    """Turn `--config.KEY=VALUE` and `--config.KEY VALUE` into `--override=KEY=VALUE`."""
    words = iter(argv)
    for word in words:
        if not word.startswith(("--config.", "-config.")):
            yield word
            continue
        key, equals, text = word.split("config.", 1)[1].partition("=")
        if not equals:
            text = "true" if overrides.takes_no_word(key) else next(words, "--")
            if text.startswith("--"):
                raise InputError(f"--config.{key} has no value; write --config.{key}=VALUE.")
        yield f"--{OVERRIDE}={key}={text}"


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    known = [n for n in values if n != OVERRIDE] + ["help"]
    keys = [f"config.{k}" for k, _ in knobs()] if "config" in values else []
    near = difflib.get_close_matches(name, known, n=2) or difflib.get_close_matches(name, keys, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join('--' + n for n in near)}?" if near else f"there are --{', --'.join(known)}."
    return f"There is no flag --{name}; {hint}"


def _wrong_value(message: str, values: flags.FlagValues) -> str:
    match = re.match(r"flag --(\w+)=(.*?): ", message, re.DOTALL)
    if not match:
        return f"{message.splitlines()[0]}."
    name, text = match.groups()
    parser = values[name].parser
    if isinstance(parser, flags.EnumParser):
        return f"--{name} is {text!r}; it takes one of {', '.join(parser.enum_values)}."
    return f"--{name} is {text!r}; it takes {parser.syntactic_help or 'true or false'}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _keep_traceback(error: BaseException) -> str:
    try:
        with tempfile.NamedTemporaryFile("w", prefix="aether-error-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
        return file.name
    except OSError as full:
        return f"no file ({full.strerror})"


def _print(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code
