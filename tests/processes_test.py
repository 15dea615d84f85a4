"""Who a process is, the roll call, and the end of all: fake schedulers, real sockets, real processes."""

import http.server
import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from aether import processes
from aether.config import Config, build
from aether.errors import AetherError, InputError
from aether.processes import cluster, desk, find, rollcall
from aether.processes.cluster import Cluster, first_host, metadata
from aether.processes.rollcall import Told, Unheard, attend, excuse, hello_of, hold

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
ATTRIBUTES = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:10.1.0.2,unknown:unknown:10.1.0.3",
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nZONE: 'us-x'\n",
}


@pytest.fixture
def tpu(monkeypatch, tmp_path):
    """This machine has TPUs, as it seems."""
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster, "TPU_FILES", (f"{tmp_path}/accel[0-9]*",))


def test_one_process_where_nothing_says_otherwise():
    assert find({}) == Cluster() and find(EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) == Cluster()
    assert find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Cluster()  # a batch script, no step


def test_explicit_variables_come_first():
    assert find(SLURM | EXPLICIT) == Cluster(3, 4, "10.0.0.1:1234", "JAX_COORDINATOR_ADDRESS")
    assert find(EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[::1]:80"}).address() == ("::1", 80)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set but JAX_COORDINATOR_ADDRESS=10.0.0.1:1234, JAX_NUM"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES is not set"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_PROCESS_ID": "4"}, "process 4 of 4"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'; it takes a whole number"),
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "process 0 of 0"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "it takes HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99999"}, "it takes HOST:PORT"),
    ],
)
def test_half_an_environment_is_told(change, said):
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        find(EXPLICIT | change)


def test_slurm(monkeypatch):
    assert find(SLURM) == Cluster(2, 4, f"gpu07:{61440 + 3}", "SLURM_STEP_NODELIST")
    with pytest.raises(InputError, match="SLURM_PROCID is not set; set it to this task's number"):
        find({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"})
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.get_coordinator_address(1, None) == find(SLURM).coordinator
    shared = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}
    assert find(SLURM | shared).devices == (0, 1)
    assert find(SLURM | shared | {"SLURM_LOCALID": "1"}).devices == (2, 3)
    assert find(SLURM | shared | {"CUDA_VISIBLE_DEVICES": "5"}).devices == ()  # SLURM has given each its own
    with pytest.raises(InputError, match="2 tasks and 3 GPUs"):
        find(SLURM | shared | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        *(("node[01-04,7]", "node01"), ("node[7]", "node7"), ("n1,n2", "n1"), ("n1", "n1")),
        *(("a-b[1-2]-ib,c", "a-b1-ib"), ("host.example,x[1-2]", "host.example")),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_gke(tpu, monkeypatch):
    env = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc"}
    assert find(env) == Cluster(1, 2, "job-0.svc:8482", "TPU_WORKER_HOSTNAMES")
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "job-0.svc:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    assert find(env | slices) == Cluster(5, 6, "job-0.svc:8482", "MEGASCALE_COORDINATOR_ADDRESS")
    with pytest.raises(InputError, match="MEGASCALE_SLICE_ID is not set"):
        find(env | slices | {"MEGASCALE_SLICE_ID": ""})
    with pytest.raises(InputError, match="This is slice 3 of 3 by MEGASCALE_SLICE_ID"):
        find(env | slices | {"MEGASCALE_SLICE_ID": "3"})
    with pytest.raises(InputError, match="worker 2 of its slice, but TPU_WORKER_HOSTNAMES names 2 machines"):
        find(env | {"TPU_WORKER_ID": "2"})
    with pytest.raises(InputError, match="TPU_WORKER_ID is not set"):
        find({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert find({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) == Cluster()
    monkeypatch.setattr(cluster, "TPU_FILES", ())
    assert find(env) == Cluster()  # variables of a pod without TPUs


@pytest.fixture
def server():
    """A metadata server; the list holds what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            value = ATTRIBUTES.get(self.path.rsplit("/", 1)[1])
            known = self.headers["Metadata-Flavor"] == "Google" and value is not None
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(value.encode() if known else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield {"GCE_METADATA_HOST": f"127.0.0.1:{httpd.server_port}"}, asked
        httpd.shutdown()
        thread.join()


def test_cloud_tpu_asks_the_metadata_server(tpu, server, monkeypatch):
    env, asked = server
    assert find(env) == Cluster(1, 2, "10.1.0.2:8482", "worker-network-endpoints")
    assert asked[0] == "/computeMetadata/v1/instance/attributes/agent-worker-number"
    monkeypatch.setitem(ATTRIBUTES, "worker-network-endpoints", "w-0,w-1")
    text = "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    monkeypatch.setitem(ATTRIBUTES, "tpu-env", text)
    assert find(env) == Cluster(3, 4, "10.9.0.1:8482", "MEGASCALE_COORDINATOR_ADDRESS")
    monkeypatch.setitem(ATTRIBUTES, "worker-network-endpoints", "")
    with pytest.raises(InputError, match="worker 1 of its slice, but worker-network-endpoints names 0 machines"):
        find(env)
    monkeypatch.delitem(ATTRIBUTES, "agent-worker-number")
    assert find(env) == Cluster()
    count = len(asked)
    assert find(env | {"TPU_SKIP_MDS_QUERY": "1"}) == Cluster() and len(asked) == count
    monkeypatch.setattr(cluster, "TPU_FILES", ())
    assert find(env) == Cluster() and len(asked) == count


def test_a_silent_metadata_server_is_told():
    with pytest.raises(InputError, match="metadata server does not say which TPU worker"):
        metadata({"GCE_METADATA_HOST": f"127.0.0.1:{port()}"})("agent-worker-number")


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def meet(tmp_path):
    """A function: hold the roll call among threads; `changes` are what single processes say otherwise of themselves.

    Returns what each ended with (None: go), and the lines that process 0 printed.
    """

    def meet(count, changes=(), absent=(), seconds=20.0, workdirs=(), address=None, after=None):
        address, said = address or f"127.0.0.1:{port()}", []

        def one(index, change):
            if index and after:
                after.join(20)
            c = Cluster(change.get("index", index), count, address, "TEST")
            same = dict(versions={"jax": "1"}, config=Config().to_json(), workdir="")
            meeting = attend if index else hold
            workdir = str(dict(workdirs).get(index, tmp_path / "run"))
            say = said.append if not index else lambda line: None
            try:
                meeting(c, {**hello_of(c), **same, **change}, workdir, seconds, say)
            except AetherError as e:
                excuse(c, str(e), e.exit_code, getattr(e, "left", 0)) if not index else None
                return e

        with ThreadPoolExecutor(count + 2) as pool:
            changes = dict(changes)
            futures = [pool.submit(one, i, changes.get(i, {})) for i in range(count) if i not in absent]
            return [f.result(60) for f in futures], said

    return meet


def same(ends) -> str:
    """Return what all were told, which has to be the same."""
    assert all(type(e) is Told for e in ends), ends
    ((text, code),) = {(str(e), e.exit_code) for e in ends}
    assert code == (1 if "did not come" in text else 2)
    return text


def test_all_come_and_go(meet, tmp_path):
    ends, said = meet(4)
    assert ends == [None] * 4
    for index in range(1, 4):
        assert any(f"process {index} of 4: {socket.gethostname()}, pid {os.getpid()}" in line for line in said)
    assert list(tmp_path.iterdir()) == []  # nothing is left of the check that all see the workdir


def test_who_is_missing_is_named(meet):
    ends, said = meet(4, absent=(1, 3), seconds=1.0)
    text = same(ends)
    assert text.startswith("Processes 1 and 3 of 4 did not come to 127.0.0.1:") and "2 on" in text
    assert any(line.startswith("waiting for processes 1") for line in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(versions={"jax": "2"}), r"Process 2 \(.*\) has jax 2 and process 0 \(.*\) 1; install the same"),
        (dict(config=build({"train": {"steps": 7}}).to_json()), r"Process 2 .* has train.steps=7 and .* 1000; give"),
        (dict(count=5), r"Process 2 .* counts 5 processes and process 0 .* 3"),
        (dict(index=1), r"Two processes call themselves 1: on .* \(pid \d+\) and on"),
        (dict(index=0), r"Two processes call themselves 0"),
        (dict(workdir="gs://b/other"), r"Process 2 .* has the workdir gs://b/other"),
        (dict(failed=["error: There is no key x.", 2]), r"process 2 .* cannot start: error: There is no key x"),
    ],
)
def test_who_does_not_fit_ends_all(meet, change, said):
    ends, _ = meet(3, {2: change})
    pytest.raises(Told, _raise, ends[0]).match(said)
    same(ends)


def _raise(error):
    raise error


def test_a_workdir_of_ones_own_is_told(meet, tmp_path, monkeypatch):
    monkeypatch.setattr(rollcall, "SHARED", 0.5)
    ends, _ = meet(3, workdirs={2: tmp_path / "elsewhere"})
    assert f"does not see the workdir {tmp_path / 'run'} of process 0" in same(ends) and not list(tmp_path.iterdir())


def test_strangers_at_the_door_change_nothing(meet):
    address = f"127.0.0.1:{port()}"
    strangers = []

    def knock():
        for words in (b"", b"GET / HTTP/1.0\r\n\r\n", b'{"greeting": "x"}\n', b"[1]\n", b'{"greeting":', b"\0" * 1000):
            line = rollcall._reach(Cluster(1, 3, address), time.monotonic(), 10, lambda _: None)
            line._socket.sendall(words)
            strangers.append(line)  # and stays

    knocking = threading.Thread(target=knock)
    knocking.start()
    ends, _ = meet(3, address=address, after=knocking)
    for line in strangers:
        line.close()
    assert ends == [None] * 3 and len(strangers) == 6


def test_one_that_leaves_may_come_again(meet):
    address = f"127.0.0.1:{port()}"
    c = Cluster(1, 3, address, "TEST")

    def come_and_go():
        line = rollcall._reach(c, time.monotonic(), 10, lambda _: None)
        line.send({**hello_of(c), **dict(versions={"jax": "1"}, config=Config().to_json(), workdir="")})
        time.sleep(0.3)
        line.close()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, 3, absent=(1, 2), seconds=3.0, address=address)
        thread.join()
        ends, said = first.result(30)
    assert "Processes 1 and 2 of 3 did not come" in str(ends[0]) and any("has left again" in line for line in said)


def test_a_coordinator_that_is_not_there_or_is_something_else():
    c = Cluster(1, 2, f"127.0.0.1:{port()}", "JAX_COORDINATOR_ADDRESS")
    said = []
    with pytest.raises(Unheard, match=rf"{c.coordinator} \(by JAX_COORDINATOR_ADDRESS\) has not answered process 1"):
        attend(c, hello_of(c), "", 0.5, said.append)
    with socket.create_server(("127.0.0.1", c.address()[1])) as other:  # takes connections and says nothing
        with pytest.raises(Unheard, match="cannot listen at port .* by TEST; end what holds it"):
            hold(Cluster(0, 2, c.coordinator, "TEST"), hello_of(c), "", 0.2, said.append)
        other.close()
    assert said == [f"waiting for port {c.address()[1]}, which something else holds (at most 0 s)"]


def test_something_else_that_answers_and_hangs_up_is_given_up(monkeypatch):
    monkeypatch.setattr(rollcall, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up():
            with suppress(OSError):
                while True:
                    other.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        c = Cluster(1, 2, f"127.0.0.1:{other.getsockname()[1]}", "TEST")
        with pytest.raises(Unheard, match="is not process 0 of this run: process 1 .* has asked it for 1 s"):
            attend(c, hello_of(c), "", 1.0, lambda line: None)
        other.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()


def test_a_connection_beyond_the_thousandth_is_alive():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1600:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1600, hard))
    one, other = socket.socketpair()
    with one, other:
        high = os.dup2(one.fileno(), 1500)
        line = desk.Line(socket.socket(fileno=high))
        assert line.alive()
        other.close()
        assert not line.alive()
        line.close()


def test_who_cannot_start_is_heard_by_all():
    address = f"127.0.0.1:{port()}"
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(excuse, Cluster(i, 3, address, "TEST"), f"{i} is bad.", 2 + i, 2) for i in range(3)]
        assert [call.result(20) for call in calls] == [None, 2, 2]


MAIN = """
    import os, signal, sys, threading, time
    from aether import processes
    from aether.config import build
    from aether.errors import CheckError, InputError
    from launch import cli

    RANK = int(os.environ["JAX_PROCESS_ID"])
    flags = cli.new_flags()

    def main(args):
        BEFORE
        processes.start(build({"faults": {"start_timeout_seconds": 60}}), WORKDIR)
        import jax
        import numpy as np
        from jax.experimental import multihost_utils
        meet = lambda: multihost_utils.process_allgather(np.ones(1))
        assert len(jax.devices()) == 3 and len(meet()) == 3
        BODY

    sys.exit(cli.run(main, flags, "doc", sys.argv[1:], several=True))
"""


def together(tmp_path, body: str, *argv: str, before: str = "pass") -> list[tuple[int, str]]:
    """Run `body` on three processes with JAX; return the exit code and the last lines of each."""
    script = tmp_path / "main.py"
    text = textwrap.dedent(MAIN).replace("WORKDIR", repr(str(tmp_path / "run")))
    for name, part in (("BODY", body), ("BEFORE", before)):
        text = text.replace(name, textwrap.indent(textwrap.dedent(part), " " * 4).strip())
    script.write_text(text)
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port()}", "JAX_NUM_PROCESSES": "3"}
    env |= {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    env.pop("XLA_FLAGS", None)
    children = [
        subprocess.Popen(
            [sys.executable, str(script), *argv],
            env={**env, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    try:
        with ThreadPoolExecutor(3) as pool:
            errors = list(pool.map(lambda child: child.communicate(timeout=120)[1], children))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [(child.returncode, error) for child, error in zip(children, errors, strict=True)]


def test_one_fails_and_all_end_with_its_message(tmp_path):
    """Process 2 fails while the others are in a collective operation, which they cannot leave."""
    ends = together(tmp_path, "if RANK == 2:\n    raise CheckError('too many bad steps.')\nmeet()")
    assert [code for code, _ in ends] == [3, 3, 3], ends
    assert f"process 2 ({socket.gethostname()}) failed: too many bad steps.\n" in ends[0][1]
    assert ends[0][1].count("too many") == 1 and not any("too many" in error for _, error in ends[1:])
    assert not any("Traceback" in error or "Gloo" in error for _, error in ends)


def test_the_same_error_on_all_is_told_once(tmp_path):
    ends = together(tmp_path, "time.sleep(RANK * 0.2)\nraise InputError('the mesh has 2 devices.')")
    assert [code for code, _ in ends] == [2, 2, 2]
    assert [error.count("error: the mesh has 2 devices.\n") for _, error in ends] == [1, 0, 0]


def test_process_0_fails_while_others_only_compute(tmp_path):
    """Nothing of theirs fails; they are ended. Process 0 goes last: the others would notice its end, and abort."""
    ends = together(tmp_path, "if RANK == 0:\n    raise RuntimeError('odd')\ntime.sleep(100)")
    assert [code for code, _ in ends] == [1, 1, 1], ends
    assert ends[0][1].splitlines()[-1].startswith("unexpected error: RuntimeError: odd; the traceback is in ")
    assert "odd" not in ends[1][1] + ends[2][1]


def test_one_that_is_stopped_while_jax_connects_tells_the_others(tmp_path):
    """Nobody is at the roll call any more; the others, who wait in a collective operation, hear it at once."""
    before = """
        import jax
        whole = jax.distributed.initialize
        def stopped(*args, **kwargs):
            whole(*args, **kwargs)
            if RANK == 1:
                from aether.errors import Stopped
                raise Stopped("stopped by SIGTERM during the start.")
        jax.distributed.initialize = stopped
    """
    begin = time.monotonic()
    ends = together(tmp_path, "meet()", before=before)
    assert [code for code, _ in ends] == [75, 75, 75], ends
    assert f"process 1 ({socket.gethostname()}) failed: stopped by SIGTERM" in ends[0][1]
    assert time.monotonic() - begin < 60, "the heartbeat alone takes 100 s"


def test_several_processes_do_not_write_to_s3(monkeypatch):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"--workdir is on s3:// \(s3://b/run\) and the run has 4 processes"):
        processes.start(build({}), "s3://b/run")
