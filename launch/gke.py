"""Train on Kubernetes: write a JobSet, a job for each slice, and create it.

python -m launch.gke --name=mine --image=IMAGE --topology=v5p:4x4x4 --slices=2 \
    -- --config=configs/aether_124m.py --workdir=gs://BUCKET/mine
  --gpus_per_node=8 --nodes=4 --accelerator=nvidia-h100-80gb   instead of --topology, on GPUs; --nodes=2 alone: on CPUs

IMAGE is what docker/Dockerfile builds. Exit codes 2 and 3 end the JobSet, any other restarts it. docs/launchers.md.
"""

import sys

from absl import flags

from aether.errors import InputError
from aether.storage import check_shared
from launch import cli, jobs, jobset

FLAGS = cli.new_flags()
flags.DEFINE_string("name", "", "of the JobSet", flag_values=FLAGS)
flags.DEFINE_string("image", "", "built from docker/Dockerfile, where the cluster can pull it", flag_values=FLAGS)
flags.DEFINE_string("topology", "", "a TPU slice: v5e:4x4, v5p:4x4x4, tpu7x:2x2x2 ...", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "slices of that topology, a node pool each", 1, flag_values=FLAGS)
flags.DEFINE_integer(
    "nodes", 0, "machines with GPUs or CPUs, a process on each, instead of --topology", 0, flag_values=FLAGS
)
flags.DEFINE_integer("gpus_per_node", 0, "GPUs of each, all taken by its process", 0, flag_values=FLAGS)
flags.DEFINE_string("accelerator", "", "their kind as GKE labels it: nvidia-h100-80gb ...", flag_values=FLAGS)
flags.DEFINE_string("namespace", "", "(empty: kubectl's)", flag_values=FLAGS)
flags.DEFINE_string(
    "context", "", "cluster, as kubectl config get-contexts names it (empty: its own)", flag_values=FLAGS
)
flags.DEFINE_string("service_account", "", "Kubernetes' account that may write to the bucket", flag_values=FLAGS)
flags.DEFINE_string("queue", "", "Kueue's local queue", flag_values=FLAGS)
flags.DEFINE_bool("spot", False, "on machines that may be taken away", flag_values=FLAGS)
flags.DEFINE_integer("retries", 10, "restarts of the whole JobSet", 0, flag_values=FLAGS)
flags.DEFINE_integer("grace", 120, "seconds to save in when the pods are told to stop", 1, flag_values=FLAGS)
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the processes; several times", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "print what would be created", flag_values=FLAGS)


def main(args: flags.FlagValues, words: list[str]) -> None:
    """Write the manifest, check it against the schema of JobSets, and create it."""
    cli.require(args, "name", "mine")
    cli.require(args, "image", "IMAGE")
    training = jobs.training(words)
    jobs.in_checkout(training)
    pool = pool_of(args)
    jobs.named(args.name, 63 - len(f"-{jobset.JOB}-{args.slices - 1}-{pool.hosts - 1}-xxxxx"))
    if "://" not in training.workdir:
        raise InputError(
            f"--workdir is {training.workdir}; a pod's disk goes when it restarts: give a bucket, as in gs://BUCKET/RUN."
        )
    check_shared(training.workdir, pool.hosts * args.slices)
    manifest = jobset.manifest(
        args.name,
        pool,
        training.words,
        image=args.image,
        slices=args.slices,
        namespace=args.namespace,
        account=args.service_account,
        queue=args.queue,
        spot=args.spot,
        retries=args.retries,
        grace=args.grace,
        env=_environment(args.env),
    )
    jobset.check(manifest)
    shell = jobs.Shell(args.dry_run, _failures(args))
    where = [f"--{n}={getattr(args, n)}" for n in ("context", "namespace") if getattr(args, n)]
    answer = shell.ask(["kubectl", *where, "create", "-f", "-"], stdin=jobset.to_yaml(manifest))
    if answer.out:
        shell.say(answer.out)
    first = f"jobset.sigs.k8s.io/jobset-name={args.name},jobset.sigs.k8s.io/job-index=0"
    first += ",batch.kubernetes.io/job-completion-index=0"
    kubectl = " ".join(["kubectl", *where])
    shell.say(f"state:  {kubectl} get jobset,pods -l jobset.sigs.k8s.io/jobset-name={args.name}")
    shell.say(f"log:    {kubectl} logs -f --tail=-1 -l {first}")
    shell.say(f"end it: {kubectl} delete jobset {args.name}")


def pool_of(args: flags.FlagValues) -> jobset.Pool:
    """Return the machines that the flags describe."""
    others = {"--nodes": args.nodes, "--gpus_per_node": args.gpus_per_node, "--accelerator": args.accelerator}
    given = [f"{name}={value}" for name, value in others.items() if value]
    if args.topology:
        if given:
            raise InputError(
                f"--topology is {args.topology!r} and {given[0]} is given too; that one is for GPUs or CPUs."
            )
        return jobset.tpu_pool(args.topology)
    if not args.nodes:
        raise InputError("--topology is missing; give it, as in --topology=v5p:4x4x4, or --nodes=2 for GPUs or CPUs.")
    if args.slices > 1:
        raise InputError(f"--slices is {args.slices} and there is no --topology; raise --nodes, GPUs have no slices.")
    if bool(args.accelerator) != bool(args.gpus_per_node):
        raise InputError(
            f"--accelerator is {args.accelerator!r} and --gpus_per_node {args.gpus_per_node}; GPUs take both, "
            "as in --accelerator=nvidia-h100-80gb --gpus_per_node=8, CPUs neither."
        )
    return jobset.Pool(args.nodes, gpus=args.gpus_per_node, accelerator=args.accelerator)


def _environment(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair.strip("="):
            raise InputError(f"--env is {pair!r}; it takes NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs)


def _failures(args: flags.FlagValues) -> jobs.Failures:
    return (
        (
            r"no matches for kind \"JobSet\"|the server doesn't have a resource type \"jobset",
            "This cluster does not know JobSets; install the JobSet controller into it (docs/launchers.md).",
        ),
        (r"AlreadyExists|already exists", f"There is a JobSet {args.name} already; delete it or take another --name."),
        (
            r"context .* does not exist",
            f"--context is {args.context}; kubectl config get-contexts lists those there are.",
        ),
        (
            r"namespaces? .* not found",
            f"--namespace is {args.namespace}; kubectl get namespaces lists those there are.",
        ),
        (
            r"(?i)connection refused|was refused|no configuration|unable to connect|no such host",
            "kubectl reaches no cluster; run gcloud container clusters get-credentials CLUSTER --location=ZONE.",
        ),
        (r"(?i)exceeded quota", "The namespace's quota is used up; free some of it or ask for more."),
        (r"(?i)forbidden", "kubectl's account may not create JobSets here; it needs the right to, in this namespace."),
    )


if __name__ == "__main__":
    sys.exit(jobs.run(main, FLAGS, __doc__, None))
