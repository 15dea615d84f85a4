"""Which of how many processes this one is, as the scheduler says: explicit variables, SLURM, GKE, or a Cloud TPU VM.

The answers agree with what `jax.distributed.initialize` would find by itself where it looks too.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aether.errors import InputError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_PORT = 8482  # JAX's, where nobody names one
METADATA = "metadata.google.internal"
TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


@dataclass(frozen=True)
class Cluster:
    """The processes of a job, as one of them knows them.

    Attributes:
      index: which one this is.
      count: how many there are.
      coordinator: HOST:PORT of process 0, empty if it is alone.
      source: what said so, for messages.
      devices: the GPUs of this machine that this process takes, by index; empty: all it can see.
    """

    index: int = 0
    count: int = 1
    coordinator: str = ""
    source: str = ""
    devices: tuple[int, ...] = ()

    def address(self) -> tuple[str, int]:
        """Return host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find(env: Mapping[str, str] = os.environ, attribute: Callable[[str], str] | None = None) -> Cluster:
    """Return which process this is; one alone where no scheduler says otherwise.

    Args:
      env: the environment.
      attribute: answers for an attribute of the machine, "" if there is none (default: the metadata server, where this
        is a Cloud TPU VM).

    Raises:
      InputError: a variable is missing or makes no sense.
    """
    for present, read in (((ADDRESS, COUNT, INDEX), _explicit), (("SLURM_STEP_NODELIST",), _slurm)):
        if any(env.get(name) for name in present):
            return _checked(read(env))
    if attribute is None and not any(any(Path("/").glob(pattern.lstrip("/"))) for pattern in TPU_FILES):
        return Cluster()
    if env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES"):
        return _checked(_gke(env))
    if attribute is None:
        if env.get("TPU_SKIP_MDS_QUERY"):
            return Cluster()
        attribute = metadata(env)
    return _checked(_tpu_vm(env, attribute)) if attribute("agent-worker-number") else Cluster()


def _explicit(env: Mapping[str, str]) -> Cluster:
    address = _need(env, ADDRESS, "the HOST:PORT of process 0")
    count, index = _number(env, COUNT, "the number of processes"), _number(env, INDEX, "this process's number")
    return Cluster(index, count, address, ADDRESS)


def _slurm(env: Mapping[str, str]) -> Cluster:
    tasks = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count, index = _number(env, tasks, "the tasks of the step"), _number(env, "SLURM_PROCID", "this task's number")
    if count == 1:
        return Cluster()
    job = _number(env, "SLURM_JOB_ID", "the job")
    port = env.get("JAX_COORDINATOR_PORT") or (1 << 16) - (1 << 12) + job % (1 << 12)
    host = first_host(env["SLURM_STEP_NODELIST"])
    return Cluster(index, count, f"{host}:{port}", "SLURM_STEP_NODELIST", _slurm_devices(env))


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...]:
    """Return this task's share of the GPUs where all tasks of a machine see all of them."""
    seen = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    each = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node, local = int(env.get("SLURM_NODEID") or 0), int(env.get("SLURM_LOCALID") or 0)
    tasks = each[node] if node < len(each) else 1
    if len(seen) < 2 or tasks < 2:
        return ()
    if len(seen) % tasks:
        raise InputError(
            f"SLURM put {tasks} tasks and {len(seen)} GPUs on this machine; make --gpus-per-node a multiple of "
            "--ntasks-per-node, or give each task its own with --gpus-per-task."
        )
    share = len(seen) // tasks
    return tuple(range(local * share, (local + 1) * share))


def _tasks_per_node(text: str) -> list[int]:
    """Read SLURM's `2(x3),1` as [2, 2, 2, 1]."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """Return the first machine of a list as SLURM writes them: `node[01-04,7]` begins with node01."""
    match = re.match(r"([^,\[\]]+)(?:\[([^\]]*)\]([^,\[]*))?", nodes)
    if not match:
        raise InputError(f"SLURM_STEP_NODELIST is {nodes!r}; it takes names of machines as in node[01-04,7].")
    name, numbers, rest = match.groups()
    return name + (re.split("[-,]", numbers)[0] + rest if numbers else "")


def _gke(env: Mapping[str, str]) -> Cluster:
    source = "TPU_PROCESS_ADDRESSES" if env.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    hosts = [h.split(":")[0] for h in env[source].split(",")]
    return _slices(env, hosts, _number(env, "TPU_WORKER_ID", "this worker's number in its slice"), env.get, source)


def _tpu_vm(env: Mapping[str, str], attribute: Callable[[str], str]) -> Cluster:
    found = {"agent-worker-number": attribute("agent-worker-number")}
    index = _number(found, "agent-worker-number", "this worker's number in its slice")
    # Either names, or NAME:ID:ADDRESS as older machines have it.
    hosts = [worker.split(":")[-1] for worker in attribute("worker-network-endpoints").split(",") if worker]
    lines = [line.partition(":") for line in attribute("tpu-env").splitlines()]
    settings = {key.strip(): value.strip().strip("'\"") for key, _, value in lines}
    return _slices(env, hosts, index, lambda name: env.get(name) or settings.get(name), "worker-network-endpoints")


def _slices(
    env: Mapping[str, str], hosts: list[str], index: int, get: Callable[[str], str | None], source: str
) -> Cluster:
    """Number the workers of all slices, slice after slice."""
    names = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    found = {name: value for name in names if (value := get(name))}
    if index >= len(hosts):
        raise InputError(f"This is worker {index} of its slice, but {source} names {len(hosts)} machines.")
    first, slices, mine = hosts[0], 1, 0
    if found:
        first = _need(found, names[0], "the machine of process 0").split(":")[0]
        slices, mine = _number(found, names[1], "the number of slices"), _number(found, names[2], "this slice's number")
        source = names[0]
        if mine >= slices:
            raise InputError(f"This is slice {mine} of {slices} by {names[2]}; the numbers go from 0 to {slices - 1}.")
    port = env.get("JAX_COORDINATOR_PORT") or TPU_PORT
    return Cluster(index + mine * len(hosts), slices * len(hosts), f"{first}:{port}", source)


def metadata(env: Mapping[str, str]) -> Callable[[str], str]:
    """Return what asks Google's metadata server for an attribute of this machine; "" if it has none."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    root = f"http://{env.get('GCE_METADATA_HOST') or env.get('GCE_METADATA_IP') or METADATA}"

    def ask(name: str) -> str:
        url = f"{root}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        for patience in (2, 5, 10):
            try:
                with opener.open(request, timeout=patience) as answer:
                    return answer.read().decode().strip()
            except urllib.error.HTTPError as e:
                if e.code == 404:
                    return ""
                reason = str(e)
            except OSError as e:
                if isinstance(getattr(e, "reason", e), socket.gaierror):
                    return ""  # a TPU outside Google's cloud
                reason = str(e)
        raise InputError(
            f"The metadata server does not say which TPU worker this is ({url}: {reason}); set {ADDRESS}, {COUNT} "
            f"and {INDEX}, or TPU_SKIP_MDS_QUERY=1 for one machine alone."
        )

    return ask


def _need(env: Mapping[str, str], name: str, what: str) -> str:
    if not env.get(name):
        others = ", ".join(f"{k}={env[k]}" for k in (ADDRESS, COUNT, INDEX) if env.get(k))
        raise InputError(f"{name} is not set{f' but {others} is' if others else ''}; set it to {what}.")
    return env[name]


def _number(env: Mapping[str, str], name: str, what: str) -> int:
    text = _need(env, name, what)
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}; it takes a whole number, {what}.")
    return int(text)


def _checked(c: Cluster) -> Cluster:
    """Return a cluster whose numbers fit together; one process needs no coordinator."""
    if c.count < 1 or c.index >= c.count:
        raise InputError(
            f"This is process {c.index} of {c.count} by {c.source}; the numbers go from 0 to {c.count - 1}."
        )
    if c.count == 1:
        return Cluster()
    host, _, port = c.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"The address of process 0 is {c.coordinator!r} by {c.source}; it takes HOST:PORT.")
    return c
