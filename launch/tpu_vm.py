"""Train on Cloud TPU VMs: ask for a slice, wait for it, copy this checkout, run on all workers, go on after preemption.

python -m launch.tpu_vm --name=mine --zone=us-east5-a --topology=v5p:4x4x8 --runtime=v2-alpha-tpuv5 --spot \
    -- --config=configs/aether_124m.py --workdir=gs://BUCKET/mine

The same command finds a run that goes on, and follows it. Ctrl-C stops following, not the run. docs/launchers.md.
"""

import sys
import time

from absl import flags

from aether.errors import AetherError, InputError
from launch import cli, jobs, workers
from launch.jobs import Ended, Shell

FLAGS = cli.new_flags()
flags.DEFINE_string("name", "", "of the queued resource and its machines", flag_values=FLAGS)
flags.DEFINE_string("zone", "", "for example us-east5-a", flag_values=FLAGS)
flags.DEFINE_string("accelerator", "", "v5litepod-16, v5p-128, v6e-64 ...", flag_values=FLAGS)
flags.DEFINE_string("topology", "", "or v5p:4x4x4, as launch.plan takes it", flag_values=FLAGS)
flags.DEFINE_string("runtime", "", "software of the machines: v2-alpha-tpuv5 for v5p ...", flag_values=FLAGS)
flags.DEFINE_string("project", "", "(empty: gcloud's)", flag_values=FLAGS)
flags.DEFINE_bool("spot", False, "cheaper machines that may be taken away", flag_values=FLAGS)
flags.DEFINE_bool("reserved", False, "machines of your reservation", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "slices of that kind, joined by their data centre", 1, flag_values=FLAGS)
flags.DEFINE_integer("retries", 10, "how often to go on after preemption or a lost machine", 0, flag_values=FLAGS)
flags.DEFINE_integer("poll", 15, "seconds between looks at the queue", 0, flag_values=FLAGS)
flags.DEFINE_bool("detach", False, "start the run and leave", flag_values=FLAGS)
flags.DEFINE_bool("delete", False, "delete the machines when the run ends; without a training: now", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "print the commands, for the case that all goes well", flag_values=FLAGS)

WAITING = ("ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "PROVISIONING", "DRAFT")
LOST = ("SUSPENDED", "SUSPENDING", "FAILED", "DELETING", "")
PATIENCE = 8  # connections in a row that bring nothing before we give up


class Resource:
    """A queued resource and the commands about it."""

    def __init__(self, args: flags.FlagValues, shell: Shell):
        self.name, self.shell, self.args = args.name, shell, args
        self.where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]
        self.nodes = [f"{self.name}-{i}" for i in range(args.slices)] if args.slices > 1 else [self.name]

    def _queued(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self.where, *words]

    def state(self, assume: str = "ACTIVE") -> str:
        """Return the state in capitals, "" if there is no such resource."""
        argv = self._queued("describe", "--format=value(state.state)")
        return self.shell.ask(argv, assume=assume, allow="NOT_FOUND", patient=True).out

    def create(self) -> None:
        """Join the queue."""
        a = self.args
        many = [f"--node-count={a.slices}", f"--node-prefix={a.name}"] if a.slices > 1 else [f"--node-id={a.name}"]
        tier = [f"--{name}" for name in ("spot", "reserved") if getattr(a, name)]
        kind = workers.kind_flags(a.accelerator, a.topology)
        self.shell.ask(self._queued("create", *kind, f"--runtime-version={a.runtime}", *many, *tier))

    def delete(self) -> None:
        """Delete the resource with its machines; none is fine."""
        self.shell.ask(self._queued("delete", "--force", "--quiet"), allow="NOT_FOUND")

    def wait(self) -> None:
        """Wait until the machines are there, and say so; create them anew if they were taken away meanwhile."""
        begin, told = time.monotonic(), ""
        state = self.state(assume="")
        while state != "ACTIVE":
            if state in LOST:
                if state == "FAILED" and told:
                    raise AetherError(
                        f"The queued resource {self.name} has FAILED; see why with: "
                        f"gcloud compute tpus queued-resources describe {self.name} {' '.join(self.where)}"
                    )
                if state:
                    self.delete()
                self.create()
            elif state not in WAITING:
                raise AetherError(f"The queued resource {self.name} is {state}, which this launcher does not know.")
            state = self.state()
            if state != "ACTIVE" and not self.shell.dry:
                spent = int(time.monotonic() - begin)
                text = f"{self.name}: {state or 'unknown'}, {spent // 3600}:{spent // 60 % 60:02d}:{spent % 60:02d}"
                print(f"{text} (Ctrl-C leaves it in the queue)", file=sys.stderr, flush=True)
                told = state
                time.sleep(self.args.poll)
        self.shell.say(f"{self.name}: the machines are there")

    def ssh(self, node: str, worker: str, script: str) -> list[str]:
        """Return the command that runs a script on one worker, or on all."""
        words = [f"--worker={worker}", "--quiet", "--ssh-flag=-oServerAliveInterval=30", f"--command={script}"]
        return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self.where, *words]

    def copy(self, node: str, source: str, target: str) -> list[str]:
        """Return the command that copies a file to all workers."""
        words = ["scp", source, f"{node}:{target}", *self.where, "--worker=all", "--quiet"]
        return ["gcloud", "compute", "tpus", "tpu-vm", *words]


def main(args: flags.FlagValues, words: list[str]) -> None:
    """Train, or delete what is left of a training."""
    jobs.named(cli.require(args, "name", "mine"), 50)
    cli.require(args, "zone", "us-east5-a")
    zone, name = args.zone, args.name
    resource = Resource(args, Shell(args.dry_run, workers.failures(name, zone, args.accelerator or args.topology)))
    if args.delete and not words:
        return resource.delete()
    if args.delete and args.detach:
        raise InputError("--delete and --detach are both given; nobody would be there to delete when the run ends.")
    training = jobs.training(words)
    jobs.in_checkout(training)
    _check(args, training)
    try:
        _train(resource, training)
    except KeyboardInterrupt:
        again = f"python -m launch.tpu_vm --name={name} {' '.join(resource.where)}"
        raise Ended(
            f"Stopped following; what was begun goes on and costs. The same command follows it again, "
            f"{again} --delete ends it.",
            130,
        ) from None


def _check(args: flags.FlagValues, training: jobs.Training) -> None:
    if bool(args.accelerator) == bool(args.topology):
        given = f"{args.accelerator!r} and {args.topology!r}"
        raise InputError(f"--accelerator and --topology are {given}; give one of them, as in --topology=v5p:2x2x2.")
    cli.require(args, "runtime", "v2-alpha-tpuv5")
    if args.spot and args.reserved:
        raise InputError("--spot and --reserved are both given; give one of them.")
    hosts = workers.hosts(args.accelerator, args.topology) * args.slices
    if hosts > 1 and not training.workdir.startswith("gs://"):
        raise InputError(
            f"--workdir is {training.workdir} and there are {hosts} machines; give one that all see, as in gs://BUCKET/RUN."
        )
    if args.spot and not training.workdir.startswith("gs://"):
        raise InputError(
            f"--workdir is {training.workdir} with --spot; a machine that is taken away takes its disk along: "
            "give one as in gs://BUCKET/RUN."
        )


def _train(resource: Resource, training: jobs.Training) -> None:
    shell, args, tries, ready = resource.shell, resource.args, 0, False
    while True:
        if not ready:
            resource.wait()
            ready = True
            attached = shell.ask(resource.ssh(resource.nodes[0], "0", workers.is_running(args.name)), assume="no").out
            if attached.endswith("yes"):
                shell.say(f"{args.name} is running; following it")
            else:
                _install(resource)
                _start(resource, training)
        else:
            _start(resource, training)
        if args.detach:
            return shell.say("the run has started; the same command without --detach follows it")
        code = _follow(resource)
        if code in jobs.FINAL:
            if args.delete:
                resource.delete()
            if code:
                raise Ended(f"The run ended with exit code {code}, which another try would not change.", code)
            return None
        if tries >= args.retries:
            raise Ended(f"The run ended with {_named(code)} and --retries={args.retries} are used up.", code or 1)
        tries += 1
        shell.say(f"the run ended with {_named(code)}; try {tries} of --retries={args.retries}")
        ready = resource.state() == "ACTIVE"


def _named(code: int | None) -> str:
    return "its machines" if code is None else f"exit code {code}"


def _install(resource: Resource) -> None:
    """Copy the checkout and install it on all workers."""
    shell, name = resource.shell, resource.args.name
    with workers.archive(shell, name) as file:
        for node in resource.nodes:
            shell.ask(resource.copy(node, file, workers.archive_name(name)))
            shell.ask(resource.ssh(node, "all", workers.install(name)))


def _start(resource: Resource, training: jobs.Training) -> None:
    """Stop what runs on the workers, and start the training on all of them."""
    for script in (workers.stop(resource.name), workers.start(resource.name, training.command("../venv/bin/python"))):
        for node in resource.nodes:
            resource.shell.ask(resource.ssh(node, "all", script))


def _follow(resource: Resource) -> int | None:
    """Print the log of process 0 until it ends; return its exit code, None if its machine has gone."""
    seen, empty, code = 0, 0, None

    def each(line: str) -> None:
        nonlocal seen, code
        if line.startswith(workers.MARK):
            word = line.removeprefix(workers.MARK).strip()
            code = int(word) if word.isdecimal() else 137  # killed before it could say
            return
        seen += 1
        if not resource.shell.dry:
            print(line, flush=True)

    while code is None:
        before = seen
        argv = resource.ssh(resource.nodes[0], "0", workers.follow(resource.name, seen + 1))
        resource.shell.follow(argv, each, assume=f"{workers.MARK} 0")
        if code is not None:
            return code
        empty = 0 if seen > before else empty + 1
        if (state := resource.state()) != "ACTIVE":
            resource.shell.say(f"{resource.name} is {state or 'gone'}")
            return None
        if empty >= PATIENCE:
            raise AetherError(f"{resource.nodes[0]} is ACTIVE and does not answer; see gcloud compute tpus tpu-vm ssh.")
        resource.shell.say("the connection was lost; connecting again")
        time.sleep(resource.args.poll)
    return code


if __name__ == "__main__":
    sys.exit(jobs.run(main, FLAGS, __doc__, None))
