"""The machines of a Cloud TPU: what they are called, and the scripts that run on them.

On each there is ~/aether-NAME with `code`, `venv`, and of the run `log`, `pid` and, once it has ended, `exit`.
"""

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from aether.chips import topology as read_topology
from aether.errors import InputError
from launch import jobs

MARK = "aether-exit"  # the last line of what `follow` prints, with the exit code
CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}  # what the number in v5p-128 counts, a chip
EIGHT = {"v5litepod": 8, "v6e": 8}  # chips of the largest slice on one machine; others have 4 on each

SIZES = (1, 4, 8, 16, 32, 64, 128, 256)  # chips of the slices of v5e and v6e


def split(accelerator: str) -> tuple[str, int]:
    """Read `v5p-128` as (v5p, 64 chips)."""
    kind, _, number = accelerator.rpartition("-")
    if kind not in CORES or not number.isdecimal() or int(number) < 1:
        raise InputError(f"--accelerator is {accelerator!r}; it takes {', '.join(f'{k}-N' for k in CORES)}.")
    cores = int(number)
    if kind in EIGHT and cores not in SIZES or kind not in EIGHT and cores % 8:
        some = ", ".join(map(str, SIZES)) if kind in EIGHT else "a multiple of 8, as it counts cores, 8 on a machine"
        raise InputError(f"--accelerator is {accelerator!r}; the number of a {kind} is {some}.")
    return kind, cores // CORES[kind]


def hosts(accelerator: str, topology: str) -> int:
    """Return the machines of a slice."""
    if topology:
        accelerator = accelerator_of(topology)
    kind, chips = split(accelerator)
    return 1 if chips <= EIGHT.get(kind, 4) else -(-chips // 4)


def accelerator_of(topology: str) -> str:
    """Return the accelerator type with the chips of `v5p:4x4x4`."""
    t = read_topology(topology)
    kind = {"v5e": "v5litepod"}.get(t.generation, t.generation)
    if kind not in CORES:
        raise InputError(f"--topology is {topology!r}; TPU VMs are v4, v5e, v5p and v6e: use launch.gke for others.")
    return f"{kind}-{t.chips * CORES[kind]}"


def kind_flags(accelerator: str, topology: str) -> list[str]:
    """Return gcloud's flags for a kind; where the number of chips leaves the shape open, they name it."""
    if not topology:
        return [f"--accelerator-type={accelerator}"]
    kind, shape = split(accelerator_of(topology))[0], topology.partition(":")[2]
    if kind in ("v4", "v5p"):
        return [f"--type={kind}", f"--topology={shape}"]
    return [f"--accelerator-type={accelerator_of(topology)}"]


def failures(name: str, zone: str, kind: str) -> jobs.Failures:
    """Return what gcloud's failures mean."""
    return (
        (
            r"(?i)quota|RESOURCE_EXHAUSTED",
            f"There is no quota for {kind or 'this TPU'} in {zone}; ask for it in the console under IAM, Quotas, "
            "or choose another --zone, --accelerator or --spot.",
        ),
        (
            r"locations/\S+ .*may not exist|Unknown zone|Invalid zone|[Ll]ocation \S+ (is )?not found",
            f"--zone is {zone}, which does not exist or is closed to you; see gcloud compute tpus locations list.",
        ),
        (
            r"(?i)accelerator.?type.*(not found|invalid|unsupported|not supported)",
            f"There is no {kind} in {zone}; see gcloud compute tpus accelerator-types list --zone={zone}.",
        ),
        (
            r"(?i)runtime.?version.*(not found|invalid)|software version",
            f"The --runtime is not one of {zone}'s; see gcloud compute tpus versions list --zone={zone}.",
        ),
        (r"(?i)gcloud auth login|Reauthentication|active account", "gcloud knows no account; run gcloud auth login."),
        (
            r"project.*(is )?not set|(property|attribute) \[project\]",
            "--project is missing and gcloud has none; give --project=ID.",
        ),
        (
            r"has not been used in project|SERVICE_DISABLED",
            "The TPU API is off; gcloud services enable tpu.googleapis.com.",
        ),
        (r"PERMISSION_DENIED", "gcloud's account may not do this; it needs the role TPU Admin in the --project."),
        (r"ALREADY_EXISTS", f"A machine called {name} is there already, not from this queue; take another --name."),
    )


def archive_name(name: str) -> str:
    """Return the name of the archive on the workers."""
    return f"aether-{name}.tgz"


@contextmanager
def archive(shell: jobs.Shell, name: str) -> Iterator[str]:
    """Pack the checkout, all that git does not ignore, and yield the archive's path."""
    with tempfile.TemporaryDirectory(prefix="aether-") as folder:
        file = f"/tmp/{archive_name(name)}" if shell.dry else f"{folder}/{archive_name(name)}"
        listed = "git ls-files -z --cached --others --exclude-standard"
        script = f"set -o pipefail; {listed} | tar --null -T - -czf {shlex.quote(file)}"
        shell.ask(["bash", "-c", script], where=str(jobs.ROOT))
        yield file


def install(name: str) -> str:
    """Unpack the archive and install it with JAX for TPUs; a Python of at least 3.11 is brought where there is none."""
    return (
        f"set -e; mkdir -p aether-{name}; cd aether-{name}; rm -rf code; mkdir code; "
        f"tar -xzf ../{archive_name(name)} -C code; "
        "fits='import sys; sys.exit(sys.version_info < (3, 11))'; "
        'if [ ! -x venv/bin/python ]; then if python3 -c "$fits" && python3 -m venv venv; then :; else rm -rf venv; '
        "python3 -m pip install -q --user uv; python3 -m uv venv -q --seed --python 3.12 venv; fi; fi; "
        "venv/bin/python -m pip install -q -e 'code[gcs]' 'jax[tpu]'"
    )


def is_running(name: str) -> str:
    """Say yes or no."""
    return f'kill -0 -- "-$(cat aether-{name}/pid 2>/dev/null)" 2>/dev/null && echo yes || echo no'


def stop(name: str) -> str:
    """Ask what runs to save and end; after a minute, kill it."""
    return (
        f'cd aether-{name}; group="-$(cat pid 2>/dev/null || echo none)"; kill -TERM -- "$group" 2>/dev/null; '
        'for i in $(seq 60); do kill -0 -- "$group" 2>/dev/null || break; sleep 1; done; '
        'kill -KILL -- "$group" 2>/dev/null; true'
    )


def start(name: str, command: str) -> str:
    """Start a command in a process group of its own, which outlives the connection."""
    inner = f"trap : TERM; {command} >../log 2>&1; echo $? >../exit.new; mv ../exit.new ../exit"
    return (
        f"set -e; cd aether-{name}/code; rm -f ../exit; "
        "if [ -e ../log ]; then mv ../log ../log.before; fi; touch ../log; "
        f"setsid nohup bash -c {shlex.quote(inner)} </dev/null >/dev/null 2>&1 & echo $! >../pid"
    )


def follow(name: str, line: int) -> str:
    """Print the log from a line on until the run has ended, then its exit code."""
    return (
        f"cd aether-{name}; tail -n +{line} --pid=$(cat pid) -F log 2>/dev/null; "
        f'echo "{MARK} $(cat exit 2>/dev/null || echo lost)"'
    )
