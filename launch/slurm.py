"""Train on a SLURM cluster: write an sbatch script and submit it.

python -m launch.slurm --name=mine --nodes=4 --gpus_per_node=8 --time=24:00:00 --partition=gpu \
    -- --config=configs/aether_124m.py --workdir=/shared/runs/mine

The run saves before its time is up and queues again, up to --retries times. docs/launchers.md.
"""

import os
import re
import sys
from pathlib import Path

from absl import flags

from aether.errors import InputError
from aether.storage import check_shared
from launch import cli, jobs

FLAGS = cli.new_flags()
flags.DEFINE_string("name", "aether", "of the job", flag_values=FLAGS)
flags.DEFINE_integer("nodes", 1, "machines", 1, flag_values=FLAGS)
flags.DEFINE_integer("tasks_per_node", 1, "processes on each; they share its GPUs evenly", 1, flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_node", 0, "GPUs of each", 0, flag_values=FLAGS)
flags.DEFINE_integer("cpus_per_task", 0, "CPUs of each process (0: the cluster's default)", 0, flag_values=FLAGS)
flags.DEFINE_string("mem", "", "memory of each machine, as in 64G (empty: the cluster's default)", flag_values=FLAGS)
flags.DEFINE_string("time", "", "limit of one try: MINUTES, HH:MM:SS or DAYS-HH:MM:SS", flag_values=FLAGS)
flags.DEFINE_string("partition", "", "(empty: the cluster's default)", flag_values=FLAGS)
flags.DEFINE_string("account", "", "that pays", flag_values=FLAGS)
flags.DEFINE_string("qos", "", "quality of service", flag_values=FLAGS)
flags.DEFINE_string("constraint", "", "features of the machines", flag_values=FLAGS)
flags.DEFINE_integer(
    "grace", 120, "seconds before the limit at which the run is told to save", 1, 65535, flag_values=FLAGS
)
flags.DEFINE_integer("retries", 10, "how often it queues again", 0, flag_values=FLAGS)
flags.DEFINE_string("logs", "", "folder of the logs, seen by all machines (empty: logs here)", flag_values=FLAGS)
flags.DEFINE_string("python", sys.executable, "the Python to run, seen by all machines", flag_values=FLAGS)
flags.DEFINE_multi_string("setup", [], "shell command before the training, as in 'module load cuda'", flag_values=FLAGS)
flags.DEFINE_multi_string("sbatch", [], "more for sbatch, as in --sbatch=--exclusive; several times", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "print the script and the command", flag_values=FLAGS)

TIME = r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?"


def main(args: flags.FlagValues, words: list[str]) -> None:
    """Write the script and submit it."""
    training = jobs.training(words)
    _check(args, training)
    logs = Path(args.logs or "logs").absolute()
    shell = jobs.Shell(args.dry_run, _failures(args))
    if not args.dry_run:
        logs.mkdir(parents=True, exist_ok=True)  # SLURM makes none, and a job without its log fails without a word
    answer = shell.ask(["sbatch", "--parsable"], stdin=script(args, training, logs), assume="JOB")
    job = answer.out.split(";")[0]
    shell.say(f"job:    {job}, squeue --job {job}")
    shell.say(f"log:    tail -F {logs}/{args.name}-{job}.log")
    shell.say(f"end it: scancel {job}; to save first: scancel --signal=TERM {job}, which queues it again")


def script(args: flags.FlagValues, training: jobs.Training, logs: Path) -> str:
    """Return the text for sbatch."""
    given = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": args.tasks_per_node,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_task,
        "mem": args.mem,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "signal": f"TERM@{args.grace}" if args.time else "",
        "chdir": os.getcwd(),
        "output": f"{logs}/{args.name}-%j.log",
        "open-mode": "append",
    }
    options = [f"--{name}={value}" for name, value in given.items() if value] + ["--requeue", *args.sbatch]
    final = "|".join(str(code) for code in jobs.FINAL)
    share = f" --cpus-per-task={args.cpus_per_task}" if args.cpus_per_task else ""  # srun takes none from sbatch
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), *args.setup]
    return "\n".join(
        [
            *lines,
            # No trap: the signal before the limit goes to the processes alone, and scancel ends this shell.
            f"srun --ntasks-per-node={args.tasks_per_node}{share} {training.command(args.python)}",
            "code=$?",
            f"case $code in {final}) exit $code ;; esac",
            f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {args.retries} ]; then',
            '  echo "aether: exit code $code; queueing again (try $((${SLURM_RESTART_COUNT:-0} + 2)))"',
            '  scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this shell meanwhile',
            "fi",
            'echo "aether: exit code $code, and the retries are used up or it could not be queued again"',
            "exit $code\n",
        ]
    )


def _check(args: flags.FlagValues, training: jobs.Training) -> None:
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise InputError(f"--name is {args.name!r}; it takes letters, digits, dots and dashes.")
    if args.gpus_per_node % args.tasks_per_node:
        raise InputError(
            f"--gpus_per_node is {args.gpus_per_node} and --tasks_per_node {args.tasks_per_node}; "
            "make the first a multiple of the second, or use one process."
        )
    if args.time and (limit := seconds(args.time)) <= args.grace:
        raise InputError(f"--time is {args.time} ({limit} s) and --grace {args.grace} s; leave some time to train.")
    if not Path(training.config).is_file():
        raise InputError(f"--config is {training.config}, but there is no such file.")
    if args.mem and not re.fullmatch(r"\d+[KMGT]?", args.mem):
        raise InputError(f"--mem is {args.mem!r}; it takes a number with K, M, G or T, as in 64G.")
    check_shared(training.workdir, args.nodes * args.tasks_per_node)
    if args.nodes > 1 and training.workdir.startswith(("/tmp/", "/dev/shm/")):
        raise InputError(
            f"--workdir is {training.workdir} and --nodes {args.nodes}; give a folder that all machines share."
        )


def seconds(text: str) -> int:
    """Read a limit as SLURM does: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    match = re.fullmatch(TIME, text)
    if not match:
        raise InputError(f"--time is {text!r}; it takes MINUTES, HH:MM:SS or DAYS-HH:MM:SS.")
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is None:
        numbers = {1: [0, *numbers], 2: [0, *numbers], 3: numbers}[len(numbers)]
    hours, minutes, secs = (numbers + [0, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def _failures(args: flags.FlagValues) -> jobs.Failures:
    return (
        (r"(?i)invalid partition", f"--partition is {args.partition!r}; sinfo --summarize lists those there are."),
        (r"(?i)invalid account", f"--account is {args.account!r}; sacctmgr show associations user=$USER lists yours."),
        (r"(?i)invalid qos", f"--qos is {args.qos!r}; sacctmgr show qos lists those there are."),
        (
            r"(?i)time limit",
            f"--time is {args.time}, more than the partition gives; sinfo --format='%P %l' lists limits.",
        ),
        (
            r"(?i)node count specification|more processors|node configuration is not available|CPU count",
            f"No machines are as asked: --nodes={args.nodes} --tasks_per_node={args.tasks_per_node} "
            f"--gpus_per_node={args.gpus_per_node}; sinfo --Node --long lists those there are.",
        ),
        (
            r"(?i)invalid generic resource",
            f"--gpus_per_node is {args.gpus_per_node}; sinfo --format='%P %G' lists GPUs.",
        ),
        (
            r"(?i)unable to contact slurm|connection refused",
            "SLURM's controller does not answer; try again, or see sinfo.",
        ),
    )


if __name__ == "__main__":
    sys.exit(jobs.run(main, FLAGS, __doc__, None))
