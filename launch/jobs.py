"""What the cluster launchers share: the training after `--`, and programs that are run, or shown by `--dry_run`.

Both ways go through the same calls of `Shell`, so what is shown is what would run.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from aether.errors import AetherError, InputError
from launch import cli

ROOT = Path(__file__).parents[1]  # the checkout
FINAL = (0, 2, 3)  # exit codes that another try cannot change: done, bad input, a failed check
PROGRAMS = {
    "gcloud": "the Google Cloud CLI, then gcloud auth login",
    "kubectl": "Kubernetes' kubectl, then gcloud container clusters get-credentials CLUSTER",
    "sbatch": "SLURM's client, or run this on a login node of the cluster",
    "bash": "bash",
}
# What a program says of a failure that may pass: of the network, of a service, of too many requests.
TRANSIENT = (
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|\b(429|500|502|503|504)\b|RATE_LIMIT|(?i:rate limit|timed? ?out|"
    r"connection (reset|refused|aborted)|network is unreachable|temporary failure|unable to find the server)"
)
WAITS = (5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0)  # seconds before each further try
Failures = Sequence[tuple[str, str]]  # (regular expression on what a program said, what to tell instead)


class Ended(AetherError):
    """A run, or a program it needs, ended in a way that is not ours: its exit code is kept."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.exit_code = code


@dataclass(frozen=True)
class Training:
    """The checked words for `python -m launch.train`."""

    words: tuple[str, ...]
    config: str
    workdir: str

    def command(self, python: str = "python") -> str:
        """Return the shell command that trains."""
        return shlex.join([python, "-m", "launch.train", *self.words])


@dataclass(frozen=True)
class Answer:
    """How a program ended, and what it printed."""

    code: int
    out: str
    err: str = ""


def run(
    main: Callable[[flags.FlagValues, list[str]], None], values: flags.FlagValues, doc: str, argv: list[str] | None
) -> int:
    """Call `main(flags, words after --)` like `cli.run`."""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    return cli.run(lambda parsed: main(parsed, argv[at + 1 :]), values, doc, argv[:at])


def training(words: list[str]) -> Training:
    """Check the words for `launch.train` and the config on this machine, where a typo costs nothing.

    Raises:
      InputError: as `launch.train` would, or the config file is not one that the other machines will have.
    """
    from launch import train

    if not words:
        raise InputError("there is no training; give it after --, as in -- --config=configs/quickstart.py --workdir=W.")
    if cli.HELP & set(words):
        raise InputError("there is a question for help after --; python -m launch.train --help answers it.")
    values = train.FLAGS
    cli.parse(values, words)
    cli.config_of(values)
    if not values.workdir:
        raise InputError("--workdir is missing after --; name the folder where the run is to be found again.")
    return Training(tuple(words), values.config, values.workdir)


def in_checkout(t: Training) -> None:
    """Require that the other machines find the config where it is here, relative to the checkout."""
    if Path(t.config).is_absolute() or not (ROOT / t.config).is_file():
        raise InputError(
            f"--config is {t.config}; name it from the checkout {ROOT}, as in configs/quickstart.py: "
            "the other machines get a copy of that folder."
        )


def named(name: str, longest: int) -> str:
    """Return a name if Google Cloud and Kubernetes take it, or raise an `InputError`."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        raise InputError(
            f"--name is {name!r}; it takes small letters, digits and dashes, a letter first, at most {longest}."
        )
    return name


@dataclass
class Shell:
    """Runs programs, or with `dry` prints them; `failures` turn what they say into one sentence."""

    dry: bool
    failures: Failures = field(default=())

    def ask(
        self,
        argv: list[str],
        *,
        stdin: str = "",
        assume: str = "",
        allow: str = "",
        where: str | None = None,
        patient: bool = False,
    ) -> Answer:
        """Run a program to its end.

        Args:
          argv: the words.
          stdin: what it reads.
          assume: what a dry run takes it to answer.
          allow: a regular expression; a failure that says so is an answer too.
          where: the folder it runs in.
          patient: try again for some minutes what fails for reasons that may pass; for questions only.

        Raises:
          InputError: it is not installed.
          AetherError: it failed.
        """
        if self.dry:
            self._show(argv, stdin, where)
            return Answer(0, assume)
        _require(argv[0])
        for wait in (*WAITS, None) if patient else (None,):
            done = subprocess.run(argv, input=stdin, text=True, capture_output=True, cwd=where)
            if not done.returncode or wait is None or not re.search(TRANSIENT, done.stderr):
                break
            self.say(f"{_told(done.stderr)}: asking again in {wait:.0f} s")
            time.sleep(wait)
        if done.returncode and not (allow and re.search(allow, done.stderr)):
            raise self._failure(argv, done.stderr or done.stdout, done.returncode)
        return Answer(done.returncode, done.stdout.strip(), done.stderr)

    def follow(self, argv: list[str], each: Callable[[str], None], assume: str) -> int:
        """Run a program, hand over its lines as they come, and return its exit code."""
        if self.dry:
            self._show(argv, "", None)
            each(assume)
            return 0
        _require(argv[0])
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        ) as child:
            try:
                for line in child.stdout or ():
                    each(line.rstrip("\n"))
            except KeyboardInterrupt:
                child.terminate()
                raise
        return child.returncode

    def say(self, text: str) -> None:
        """Tell what is going on, as a comment among the commands of a dry run."""
        print(f"# {text}" if self.dry else text, file=sys.stdout if self.dry else sys.stderr, flush=True)

    def _show(self, argv: list[str], stdin: str, where: str | None) -> None:
        line = shlex.join(argv)
        line = f"(cd {shlex.quote(where)} && {line})" if where else line
        print(f"{line} <<'END'\n{stdin.rstrip()}\nEND" if stdin else line, flush=True)

    def _failure(self, argv: list[str], said: str, code: int) -> AetherError:
        for pattern, text in self.failures:
            if re.search(pattern, said):
                return InputError(text)
        return AetherError(f"{' '.join(argv[:5])} ended with {code}: {_told(said)}.")


def _told(said: str) -> str:
    """Return the line of what a program said that tells most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = next((line for line in lines if re.match("(?i)error", line)), lines[-1] if lines else "it said nothing")
    return told.rstrip(".")


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise InputError(
            f"{program} is not installed here; install {PROGRAMS[program]}, or see the commands by --dry_run."
        )
