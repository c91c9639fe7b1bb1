"""JobSet manifests: valid by the custom resource definition, and what GKE's TPUs need."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CRD = yaml.safe_load((Path(__file__).parent / "jobset_crd.yaml").read_text())
CLUSTER = ["--config.cluster.image=registry/phi3:1", "--config.cluster.volume=studies"]
SLICE = "sweep,scale=pico,budgets=1M,4M,topology=v5p:4x4x8"


def strict(node: Any) -> Any:
    """The schema with unknown fields forbidden, as `kubectl apply` and the API server treat them."""
    if isinstance(node, list):
        return [strict(child) for child in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(child) for key, child in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        node["type"] = ["integer", "string"]
    if (
        isinstance(node.get("properties"), dict)
        and node.get("type") == "object"
        and "metadata" not in node["properties"]
    ):
        node["additionalProperties"] = False
    return node


SCHEMA = strict(CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def errors(manifest: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]


@pytest.fixture
def manifests(submit: Callable) -> Callable[..., list[dict]]:
    """The JobSets of a dry run."""

    def make(words: str, *more: str) -> list[dict]:
        given = [option.partition("=")[0] for option in more]
        rest = [option for option in CLUSTER if option.partition("=")[0] not in given]
        status, out, err = submit(words, "--backend=gke", "--dry_run", *rest, *more)
        assert status == 0, err
        texts = out.split("# writes ")[1:]
        return [yaml.safe_load(text.partition("\n")[2].rpartition("(cd --")[0]) for text in texts]

    return make


@pytest.mark.parametrize("topology", ["v5p:4x4x8", "2xv5p:4x4x4", "v6e:1x1", "tpu7x:4x4x4", "h100:4x8", "b200:8"])
def test_every_manifest_is_valid(manifests: Callable, topology: str) -> None:
    options = ["--config.cluster.queue=multislice-queue", "--config.cluster.options=pool=a spot=true"]
    made = manifests(f"sweep,scale=pico,topology={topology}", *options)
    assert len(made) == 3
    assert [errors(manifest) for manifest in made] == [[], [], []]
    assert {(manifest["apiVersion"], manifest["kind"]) for manifest in made} == {("jobset.x-k8s.io/v1alpha2", "JobSet")}


@pytest.mark.parametrize(
    "path,value,message",
    [
        (["failurePolicy", "rules", 0, "action"], "Restart", "is not one of"),
        (["replicatedJobs", 0, "replicas"], "2", "is not of type 'integer'"),
        (["replicatedJobs", 0, "template", "spec", "completion"], 2, "unexpected"),
        (["replicatedJobs", 0, "template", "spec", "template", "spec", "containers"], None, "None is not of type"),
    ],
)
def test_the_schema_finds_mistakes(manifests: Callable, path: list, value: Any, message: str) -> None:
    broken = copy.deepcopy(manifests(SLICE)[0])
    node = broken["spec"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert any(message in error for error in errors(broken))


def pod(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_slice_is_asked_for_whole(manifests: Callable) -> None:
    first, *_ = made = manifests(SLICE)
    assert len(made) == 3  # a trunk and its fork for each size
    (part,) = first["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    assert (part["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (1, 32, 32, 0)
    assert pod(first)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x8"
    }  # fmt: skip
    (container,) = pod(first)["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"][-1] == "--run=mini-s0-4M,mini-s0-1M"
    assert pod(first)["terminationGracePeriodSeconds"] >= 30
    name = first["metadata"]["name"]
    assert first["metadata"]["labels"]["xpk.google.com/workload"] == name
    assert first["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert len({m["metadata"]["name"] for m in made}) == 3


def test_multislice_repeats_the_slice(manifests: Callable) -> None:
    (made,) = manifests("mini,scale=pico,topology=2xv5p:4x4x4")
    (part,) = made["spec"]["replicatedJobs"]
    assert part["replicas"] == 2 and part["template"]["spec"]["completions"] == 16


def test_a_saved_stop_or_a_preemption_restarts_without_being_counted(manifests: Callable) -> None:
    from phi3_jax.study.launch import STOPPED

    spec = manifests(SLICE)[0]["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    disrupted, stopped = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert stopped["onExitCodes"]["values"] == [STOPPED]
    assert stopped["onExitCodes"]["containerName"] == pod(manifests(SLICE)[0])["containers"][0]["name"]


def test_gpu_nodes_are_told_where_to_meet(manifests: Callable) -> None:
    (made,) = manifests("mini,scale=pico,topology=h100:4x8")
    (container,) = pod(made)["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod(made)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    environment = {entry["name"]: entry.get("value") or entry["valueFrom"] for entry in container["env"]}
    name = made["metadata"]["name"]
    assert environment["PHI3_JAX_COORDINATOR"].startswith(f"{name}-slice-job-0-0.{name}:")
    assert environment["PHI3_JAX_PROCESSES"] == "4"
    assert "job-completion-index" in environment["PHI3_JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]


def test_hostile_values_stay_values(manifests: Callable) -> None:
    hostile = "x: [&a *a] # {{}}\n---\n- 'é\"$(id) !!python/object:os.system"
    (made,) = manifests(
        "mini,scale=pico,topology=v6e:1x1", f"--config.cluster.image={hostile}", f"--config.data.tokenizer={hostile}"
    )
    (container,) = pod(made)["containers"]
    assert container["image"] == hostile
    assert f"--config.data.tokenizer={hostile}" in container["command"]


def test_sending_again(submit: Callable, clients: Any, tmp_path: Path) -> None:
    status, out, _ = submit(SLICE, "--backend=gke", *CLUSTER)
    applied = clients.calls("kubectl", "apply")
    assert status == 0 and out.count("sent") == len(applied) == 3
    names = [call[2].removeprefix("--filename=").removesuffix(".yaml") for call in applied]
    assert all((tmp_path / "study" / "submission" / f"{name}.yaml").exists() for name in names)
    assert {call[-1] for call in applied} == {str(tmp_path / "study" / "submission")}

    def jobset(name: str, *conditions: str, ready: int = 0) -> dict:
        rows = [{"type": condition, "status": "True"} for condition in conditions]
        return {"metadata": {"name": name}, "status": {"conditions": rows, "replicatedJobsStatus": [{"ready": ready}]}}

    items = [jobset(names[0], ready=1), jobset(names[1], "Failed"), jobset(names[2], "Completed"), jobset("other")]
    clients.answer("kubectl", json.dumps({"items": items}))
    status, out, _ = submit(SLICE, "--backend=gke", *CLUSTER)
    assert status == 0 and "running already" in out and "done already" in out and out.count("sent") == 1
    assert [call[3] for call in clients.calls("kubectl", "delete")] == [names[1]]
    assert len(clients.calls("kubectl", "apply")) == 4
    status, out, _ = submit(SLICE, "--backend=gke", "--status", *CLUSTER)
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["running"] * 2 + ["failed"] * 2 + ["done"] * 2
