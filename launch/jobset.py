"""The JobSet that trains: a replicated job whose replicas are slices and whose pods are machines.

All pods of a slice stand in one node pool. A pod that ends with 2 or 3 fails the JobSet; any other failure recreates
all pods, and the training goes on from its checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aether.chips import topology as read_topology
from aether.errors import AetherError, InputError
from launch import jobs

JOB = "slice"
PORT = 8476  # of process 0, where no TPU tells
GRACE_KEY = "terminationGracePeriodSeconds"
# The names of GKE's node pools by chip; a machine has 4 chips, or all of a slice of up to `one` chips.
POOLS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 8),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 8),
    "tpu7x": ("tpu7x", 4),
}


@dataclass(frozen=True)
class Pool:
    """Machines of one kind.

    Attributes:
      hosts: how many, in a slice.
      chips: TPU chips of each.
      gpus: GPUs of each.
      accelerator: GKE's name of the chips.
      topology: of a TPU slice, 4x4x4.
    """

    hosts: int
    chips: int = 0
    gpus: int = 0
    accelerator: str = ""
    topology: str = ""

    @property
    def selector(self) -> dict[str, str]:
        """Return the labels of the nodes."""
        if self.chips:
            prefix = "cloud.google.com/gke-tpu"
            return {f"{prefix}-accelerator": self.accelerator, f"{prefix}-topology": self.topology}
        return {"cloud.google.com/gke-accelerator": self.accelerator} if self.gpus else {}

    @property
    def limits(self) -> dict[str, int]:
        """Return the devices that a pod takes."""
        return {"google.com/tpu": self.chips} if self.chips else {"nvidia.com/gpu": self.gpus} if self.gpus else {}


def tpu_pool(text: str) -> Pool:
    """Return the machines of a slice of `v5p:4x4x4`."""
    t = read_topology(text)
    if t.generation not in POOLS:
        raise InputError(f"--topology is {text!r}; GPUs are given by --nodes, --gpus_per_node and --accelerator.")
    accelerator, one = POOLS[t.generation]
    each = t.chips if t.chips <= one else 4
    return Pool(t.chips // each, each, accelerator=accelerator, topology="x".join(str(n) for n in t.shape))


def manifest(
    name: str,
    pool: Pool,
    words: Sequence[str],
    *,
    image: str,
    slices: int = 1,
    namespace: str = "",
    account: str = "",
    queue: str = "",
    spot: bool = False,
    retries: int = 10,
    grace: int = 120,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the JobSet as Kubernetes takes it."""
    pod = _pod(name, pool, words, image, env or {})
    pod |= {GRACE_KEY: grace} | ({"serviceAccountName": account} if account else {})
    if spot:
        pod["nodeSelector"] = pod["nodeSelector"] | {"cloud.google.com/gke-spot": "true"}
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}]
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if pool.chips else {}
    metadata: dict[str, Any] = {"name": name}
    metadata |= {"namespace": namespace} if namespace else {}
    metadata |= {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    metadata |= {"annotations": annotations} if annotations else {}
    final = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = {"name": JOB, "replicas": slices, "template": {"spec": _job(pool, pod)}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": retries, "rules": [final]},
            "replicatedJobs": [job],
        },
    }


def _job(pool: Pool, pod: dict[str, Any]) -> dict[str, Any]:
    codes = {"containerName": "train", "operator": "In", "values": [c for c in jobs.FINAL if c]}
    return {
        "completionMode": "Indexed",
        "completions": pool.hosts,
        "parallelism": pool.hosts,
        "backoffLimit": 0,  # one lost pod is the end of this try, since the others cannot go on without it
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod},
    }


def _pod(name: str, pool: Pool, words: Sequence[str], image: str, env: dict[str, str]) -> dict[str, Any]:
    variables: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in env.items()]
    if not pool.chips and pool.hosts > 1:  # GKE tells the processes of a TPU slice who they are, nobody tells others
        index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        variables += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{JOB}-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(pool.hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": index}},
        ]
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "args": list(words),
        "env": variables,
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"}
        ],  # Kubernetes' own is 64 MiB; NCCL and Grain use more
    }
    if pool.chips:  # libtpu's ports: between the workers of a slice, and of slices
        container["ports"] = [{"containerPort": 8471}, {"containerPort": 8080}]
    if pool.limits:
        container["resources"] = {"limits": pool.limits}
    return {
        "restartPolicy": "Never",  # podFailurePolicy asks for it; the JobSet restarts
        "nodeSelector": pool.selector,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


def to_yaml(values: dict[str, Any]) -> str:
    """Return a manifest as text."""
    try:
        import yaml
    except ImportError:
        raise InputError("launch.gke writes YAML; pip install 'aether[gke]'.") from None
    return yaml.safe_dump(values, sort_keys=False, width=110)


def check(values: dict[str, Any]) -> None:
    """Check a manifest against the schema of JobSets.

    Raises:
      InputError: the schema is not installed.
      AetherError: a field is missing, unknown or of the wrong kind.
    """
    try:
        from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
    except ImportError:
        raise InputError(
            "launch.gke checks what it writes against JobSet's schema; pip install 'aether[gke]'."
        ) from None
    try:
        read = JobsetV1alpha2JobSet.from_dict(values)
    except ValueError as e:  # pydantic's own is one
        where = ": ".join(line.strip() for line in str(e).splitlines()[1:3])
        raise AetherError(f"The manifest does not fit JobSet's schema: {where}.") from None
    unknown = _unknown(values, read.to_dict() if read else {}, "")
    if unknown:
        raise AetherError(f"The manifest does not fit JobSet's schema: {unknown} is no field of it.")


def _unknown(given: Any, known: Any, path: str) -> str:
    """Return the path of the first thing in `given` that reading it has dropped or changed, "" if there is none."""
    if isinstance(given, dict) and isinstance(known, dict):
        inner = (_unknown(v, known.get(k), f"{path}.{k}".lstrip(".")) for k, v in given.items())
        return next(filter(None, inner), "")
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        inner = (_unknown(v, w, f"{path}[{i}]") for i, (v, w) in enumerate(zip(given, known, strict=True)))
        return next(filter(None, inner), "")
    return "" if given == known else path or "all of it"
