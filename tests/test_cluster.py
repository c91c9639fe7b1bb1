"""Which process this is, by the environment alone; and what a parent says of a child that jax has aborted."""

from __future__ import annotations

import http.server
import signal
import threading
from collections.abc import Iterator

import pytest

from phi3_jax import cluster as clusters
from phi3_jax.cluster import BY_HAND, Cluster, cluster, explain, start_seconds
from phi3_jax.errors import UserError

HAND = dict(zip(BY_HAND, ("10.0.0.1:8476", "4", "3"), strict=True))
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (HAND, Cluster("hand", "10.0.0.1:8476", 4, 3)),
        (HAND | STEP, Cluster("hand", "10.0.0.1:8476", 4, 3)),
        (HAND | {"PHI3_JAX_PROCESSES": "1", "PHI3_JAX_PROCESS_ID": "0"}, None),
        (STEP, Cluster("slurm", None, 4, 2)),
        (BATCH_SCRIPT, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Cluster("mpi", None, 2, 1)),
    ],
)
def test_who_this_is(environment: dict[str, str], expected: Cluster | None) -> None:
    assert cluster(environment) == expected


@pytest.mark.parametrize(
    "environment, several",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
        ({}, False),
    ],
)
def test_tpu_hosts_count_only_where_there_is_libtpu(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_has_tpu", lambda: False)
    for there in (True, False):
        monkeypatch.setattr(clusters.util, "find_spec", lambda name, there=there: name if there else None)
        assert cluster(environment) == (Cluster("tpu") if several and there else None)


@pytest.fixture
def metadata_server() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.path.endswith("/worker-network-endpoints") and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write(b"unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("localhost", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()


def test_a_tpu_vm_asks_the_metadata_server(metadata_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.util, "find_spec", lambda name: name)
    monkeypatch.setattr(clusters, "_has_tpu", lambda: True)
    assert cluster({"GCE_METADATA_IP": metadata_server}) == Cluster("tpu")
    assert cluster({"GCE_METADATA_IP": metadata_server, "TPU_SKIP_MDS_QUERY": "1"}) is None
    assert cluster({"GCE_METADATA_IP": "localhost:1"}) is None  # nobody answers there


@pytest.mark.parametrize(
    "change, said",
    [
        ({"PHI3_JAX_PROCESSES": ""}, "PHI3_JAX_PROCESSES must be set too"),
        ({"PHI3_JAX_COORDINATOR": "10.0.0.1"}, "'10.0.0.1' is not host:port"),
        ({"PHI3_JAX_PROCESS_ID": "4"}, "PHI3_JAX_PROCESS_ID=4 of PHI3_JAX_PROCESSES=4"),
        ({"PHI3_JAX_PROCESSES": "four"}, "PHI3_JAX_PROCESSES=four"),
    ],
)
def test_a_job_set_up_by_hand_is_checked(change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cluster(HAND | change)


def test_the_time_to_wait_is_checked() -> None:
    assert (start_seconds({}), start_seconds({"PHI3_JAX_START_TIMEOUT": "7"})) == (300, 7)
    with pytest.raises(UserError, match="'soon' is not a whole number of seconds"):
        start_seconds({"PHI3_JAX_START_TIMEOUT": "soon"})


SILENT = (
    "E1125 03:31:34 6713 coordination_service.cc:1549] [113] Use error polling to propagate the following error to all "
    "tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1,3\nThe tasks have crashed."
)
GONE = "F1125 03:31:16 6362 client.h:80] ... UNAVAILABLE: Failed to send RPC to coordination service. Either the leader"
NOBODY = (
    "F1125 03:36:27 8338 client.h:80] ... DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
)


@pytest.mark.parametrize(
    "status, log, said, exit_status",
    [
        (-signal.SIGABRT, SILENT, "process 1,3 died", 1),
        (-signal.SIGABRT, GONE, "process 0, the coordinator 10.0.0.1:8476, died or cannot be reached", 1),
        (-signal.SIGABRT, NOBODY, "the coordinator 10.0.0.1:8476 did not answer within 300 s", 2),
        (-signal.SIGKILL, "", "process 3 of 4 was ended by SIGKILL", 1),
        (-signal.SIGSEGV, "", "process 3 of 4 was ended by SIGSEGV", 1),
    ],
)
def test_one_line_says_who_died(status: int, log: str, said: str, exit_status: int) -> None:
    reason, code = explain(cluster(HAND), status, log)
    assert said in reason and "\n" not in reason and code == exit_status
