"""The Kubernetes launcher: manifests against JobSet's schema, a kubectl that records, and the image's Dockerfile."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from aether.errors import AetherError
from aether.processes import cluster
from launch import cli, gke, jobs, jobset

ROOT = Path(__file__).parents[2]
TRAINING = ["--", "--config=configs/quickstart.py", "--workdir=gs://bucket/mine"]
FLAGS = ["--name=mine", "--image=image:1"]
GPUS = ["--nodes=2", "--gpus_per_node=8", "--accelerator=nvidia-h100-80gb"]


def run(*argv: str) -> int:
    return jobs.run(gke.main, gke.FLAGS, gke.__doc__, list(argv))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a kubectl on PATH that keeps its argv and input, and ends as the test says."""

    def make(err: str = "", code: int = 0) -> Path:
        program = tmp_path / "bin" / "kubectl"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"""#!{sys.executable}
import json, pathlib, sys
pathlib.Path({str(tmp_path / "call")!r}).write_text(json.dumps([sys.argv[1:], sys.stdin.read()]))
print({err!r}, file=sys.stderr); sys.exit({code})
""")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return tmp_path / "call"

    return make


def written(fake, *words: str) -> dict:
    """Return the manifest that the launcher creates."""
    call = fake()
    assert run(*FLAGS, *words, *TRAINING) == 0
    return yaml.safe_load(json.loads(call.read_text())[1])


def job_of(manifest: dict) -> tuple[dict, dict, dict]:
    """Return the job, its pod and the pod's container."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, job["template"]["spec"], container


@pytest.mark.parametrize("words", [["--topology=v5p:4x4x4", "--slices=2", "--spot", "--queue=q"], GPUS, ["--nodes=1"]])
def test_dry_run_prints_what_the_real_run_creates(words, fake, capsys):
    call = fake()
    words = [*FLAGS, "--context=c", "--namespace=n", "--service_account=s", "--env=A=b=c", *words, *TRAINING]
    assert run("--dry_run", *words) == 0
    assert not call.exists()
    shown = capsys.readouterr().out
    assert run(*words) == 0
    argv, manifest = json.loads(call.read_text())
    assert argv == ["--context=c", "--namespace=n", "create", "-f", "-"]
    assert shown.startswith(f"kubectl {' '.join(argv)} <<'END'\n{manifest.rstrip()}\nEND\n")
    pod, container = job_of(yaml.safe_load(manifest))[1:]
    assert pod["serviceAccountName"] == "s" and {"name": "A", "value": "b=c"} in container["env"]


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:8x8x8", "tpu-v5p-slice", 128, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("tpu7x:2x2x2", "tpu7x", 2, 4),
    ],
)
def test_slices_of_tpus(topology, accelerator, hosts, chips, fake):
    manifest = written(fake, f"--topology={topology}", "--slices=3", "--retries=4", "--grace=60")
    job, pod, container = job_of(manifest)
    prefix = "cloud.google.com/gke-tpu"
    shape = topology.partition(":")[2]
    assert pod["nodeSelector"] == {f"{prefix}-accelerator": accelerator, f"{prefix}-topology": shape}
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert job["parallelism"] == job["completions"] == hosts and manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert manifest["metadata"]["annotations"].popitem()[1] == "cloud.google.com/gke-nodepool"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 4 and pod["terminationGracePeriodSeconds"] == 60
    assert not any(entry["name"].startswith("JAX_") for entry in container["env"])  # GKE itself tells TPU workers


def test_exit_codes_2_and_3_end_it_and_others_restart_all(fake):
    manifest = written(fake, "--topology=v5e:4x4")
    job, pod, container = job_of(manifest)
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert rule == {"action": "FailJob", "onExitCodes": codes} and pod["restartPolicy"] == "Never"
    (final,) = manifest["spec"]["failurePolicy"]["rules"]
    assert final["action"] == "FailJobSet" and final["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0


def test_pods_with_gpus_learn_who_they_are(fake):
    manifest = written(fake, *GPUS)
    job, _, container = job_of(manifest)
    assert job["completionMode"] == "Indexed" and container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    index = next(e for e in container["env"] if e["name"] == cluster.INDEX)["valueFrom"]["fieldRef"]["fieldPath"]
    assert "job-completion-index" in index
    found = cluster.find(env | {cluster.INDEX: "1"})
    assert (found.index, found.count) == (1, 2)
    host = found.address()[0]  # POD.SUBDOMAIN, a pod being called JOBSET-JOB-REPLICA-INDEX
    assert (
        host == f"mine-{manifest['spec']['replicatedJobs'][0]['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    )


def test_the_image_runs_what_follows_the_dashes(fake):
    assert job_of(written(fake, "--nodes=1"))[2]["args"] == TRAINING[1:]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3, "spec.failurePolicy.maxRestart is no field"),
        (("spec", "network", "subdomain"), 3, "subdomain"),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralelism"), 3, "paralelism is no field"),
        (("spec", "replicatedJobs", 0, "name"), None, "name"),
    ],
)
def test_schema_refuses(path, value, told):
    manifest = jobset.manifest("mine", jobset.tpu_pool("v5e:4x4"), ["--x"], image="image")
    jobset.check(manifest)
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(AetherError, match=re.escape(told)):
        jobset.check(manifest)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*FLAGS, *TRAINING], "--topology is missing"),
        ([*FLAGS, "--topology=v5p:5x5x5", *TRAINING], "v5p comes as"),
        ([*FLAGS, "--topology=h100:8", *TRAINING], "--gpus_per_node"),
        ([*FLAGS, "--topology=v5e:4x4", "--nodes=2", *TRAINING], "--nodes=2 is given too"),
        ([*FLAGS, "--nodes=2", "--slices=2", *TRAINING], "--slices is 2"),
        ([*FLAGS, "--nodes=2", "--gpus_per_node=8", *TRAINING], "--accelerator is ''"),
        ([*FLAGS, "--nodes=1", "--env=A", *TRAINING], "--env is 'A'"),
        ([*FLAGS, "--nodes=1", *TRAINING[:2], "--workdir=runs/x"], "--workdir is runs/x"),
        ([*FLAGS, "--nodes=2", *TRAINING[:2], "--workdir=s3://b/r"], "on s3:// (s3://b/r) and the run has 2 processes"),
        (["--name=" + "a" * 60, "--image=i", "--nodes=1", *TRAINING], "at most"),
        (["--name=mine", "--nodes=1", *TRAINING], "--image is missing"),
    ],
)
def test_bad_input_is_told_before_anything_is_created(words, told, fake, capsys):
    call = fake()
    assert run(*words) == 2
    assert told in capsys.readouterr().err and not call.exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', "does not know JobSets"),
        ('Error from server (AlreadyExists): jobsets "mine" already exists', "There is a JobSet mine already"),
        ("The connection to the server localhost:8080 was refused", "kubectl reaches no cluster"),
        ("Error from server: something new", "kubectl create -f - ended with 1: Error from server: something new."),
    ],
)
def test_failures_of_kubectl_are_one_sentence(said, told, fake, capsys):
    fake(err=said, code=1)
    assert run(*FLAGS, "--nodes=1", *TRAINING) in (1, 2)
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


def test_dockerfile_starts_python_itself_and_copies_what_is_there():
    lines = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    assert {word for word, _ in steps} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
    (entry,) = [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT"]  # JSON: no shell takes the signals
    assert entry == ["python", "-m", "launch.train"]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    assert {"aether", "launch", "configs", "pyproject.toml"} <= set(copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in copied:
        assert (ROOT / source).exists() and source in allowed
    assert [rest for word, rest in steps if word == "FROM"] == ["${PYTHON}"]
