"""GKE: one JobSet a trunk and its forks, on TPU slices (several: multislice) or on GPU nodes.

Forks follow their trunk in the same JobSet's job, and so keep its slices: JobSet's `dependsOn` orders replicated jobs,
but a second replicated job would change the number of slices that the TPU runtime of a multislice is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.submission import hardware, templates
from phi3_jax.submission.backend import Backend, Submitted, call
from phi3_jax.submission.jobs import Job, Study, run_command

MOUNT = "/studies"
KIND = "jobsets.jobset.x-k8s.io"
PORT = 8476  # of jax's coordinator on GPU nodes; on TPUs jax and the runtime find each other


class Gke(Backend):
    """Needs cluster.image (its working directory is this repository) and cluster.volume, a ReadWriteMany claim."""

    together = True

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self.place = container_place(study)
        self.hardware = hardware.parse(required_topology(study))
        if not (self.hardware.tpu or self.hardware.gpu):
            raise UserError(f"topology={study.config.topology}: GKE has TPUs or GPUs; for example {hardware.EXAMPLES}")

    def file(self, job: Job) -> tuple[str, str]:
        tpu, chips = self.hardware.tpu, self.hardware.chips
        resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
        labels = {"xpk.google.com/workload": job.name}
        if self.cluster.queue:
            labels["kueue.x-k8s.io/queue-name"] = self.cluster.queue
        values = {
            "name": job.name,
            "labels": labels,
            # one slice, one node pool: the pods of a slice must share its interconnect
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
            if tpu
            else {},
            "slices": self.hardware.slices,
            "hosts": self.hardware.hosts,
            "node_labels": self._node_labels(),
            "resource": resource,
            "resources": {"limits": {resource: chips}},
            "privileged": tpu is not None,
            "image": self.cluster.image,
            "command": run_command(self.study, job.runs, self.place, "python"),
            "environment": [] if tpu else self._environment(job),
            "mount": MOUNT,
            "volume": self.cluster.volume,
        }
        return f"{job.name}.yaml", templates.manifest("jobset.yaml", values)

    def _node_labels(self) -> dict[str, str]:
        labels = {}
        for pair in self.options:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"cluster.options={pair!r} is no node label; write KEY=VALUE")
            labels[key] = value
        nodes = {}
        if self.hardware.gpu:
            nodes["cloud.google.com/gke-accelerator"] = self.hardware.gpu
        if self.hardware.tpu:
            nodes["cloud.google.com/gke-tpu-accelerator"] = self.hardware.tpu.gke
            nodes["cloud.google.com/gke-tpu-topology"] = self.hardware.shape
        return nodes | labels

    def _environment(self, job: Job) -> list[dict[str, Any]]:
        """Where the processes of several GPU nodes meet: the first pod of the job, by JobSet's host names."""
        if self.hardware.hosts == 1:
            return []
        index = "metadata.labels['batch.kubernetes.io/job-completion-index']"
        return [
            {"name": "PHI3_JAX_COORDINATOR", "value": f"{job.name}-slice-job-0-0.{job.name}:{PORT}"},
            {"name": "PHI3_JAX_PROCESSES", "value": str(self.hardware.hosts)},
            {"name": "PHI3_JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]

    def commands(self, job: Job, submitted: Mapping[str, Submitted]) -> list[list[str]]:
        delete = (
            [["kubectl", "delete", KIND, job.name]] if job.name in submitted else []
        )  # it failed; names are taken once
        return [*delete, ["kubectl", "apply", f"--filename={job.name}.yaml"]]

    def submitted(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        names = {job.name for job in jobs}
        items = json.loads(call(["kubectl", "get", KIND, "--selector=xpk.google.com/workload", "--output=json"]))[
            "items"
        ]
        states = {item["metadata"]["name"]: _state(item.get("status", {})) for item in items}
        return {name: Submitted(state, name) for name, state in states.items() if name in names}

    def hint(self, job: Job) -> str:
        return f"kubectl logs --follow --selector=xpk.google.com/workload={job.name}"


def _state(status: Mapping[str, Any]) -> str:
    """JobSet's conditions in our words."""
    true = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
    if true & {"Completed", "Failed"}:
        return "done" if "Completed" in true else "failed"
    ready = any(part.get("ready") for part in status.get("replicatedJobsStatus", ()))
    return "running" if ready else "waiting"


def container_place(study: Study) -> str:
    """The study's folder inside a container; its experiment file must be one of the image's.

    Raises:
      UserError: an experiment file outside the repository.
    """
    experiment = PurePath(study.command.experiment.partition(":")[0])
    if experiment.is_absolute() or ".." in experiment.parts:
        raise UserError(f"{experiment} is not in the image; give the experiment's path relative to the repository")
    return f"{MOUNT}/{study.folder.name}"


def required_topology(study: Study) -> str:
    """The config's topology.

    Raises:
      UserError: there is none.
    """
    if not study.config.topology:
        raise UserError(f"no topology; add the word topology= to --config, for example {hardware.EXAMPLES}")
    return study.config.topology
