"""TPU VMs: one queued resource per trunk and its forks; a startup script on every host trains in a container."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from phi3_jax.errors import UserError
from phi3_jax.submission import hardware, templates
from phi3_jax.submission.backend import Backend, Submitted, call
from phi3_jax.submission.gke import MOUNT, container_place, required_topology
from phi3_jax.submission.jobs import Job, Study, run_command

GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]
# States of a queued resource (Cloud TPU's page "Manage queued resources"); every other one is on its way.
STATES = {"ACTIVE": "running", "SUSPENDING": "running", "SUSPENDED": "failed", "FAILED": "failed", "DELETING": "failed"}


class TpuVm(Backend):
    """Needs cluster.project, cluster.zone, cluster.image (with this repository) and cluster.volume, an NFS share."""

    together = True

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self.place = container_place(study)
        self.hardware = hardware.parse(required_topology(study))
        offered = ", ".join(chip for chip, names in hardware.TPUS.items() if names.vm)
        names = self.hardware.tpu
        if names is None or names.vm is None:
            raise UserError(f"topology={study.config.topology}: TPU VMs come as {offered}; use --backend gke")
        self.names = names
        for field in ("project", "zone"):
            if not self.cluster[field]:
                raise UserError(f"gcloud needs {field!r}; give it with --config.cluster.{field}=VALUE")

    @property
    def _where(self) -> list[str]:
        return [f"--project={self.cluster.project}", f"--zone={self.cluster.zone}"]

    def file(self, job: Job) -> tuple[str, str]:
        values = {
            "mount": MOUNT,
            "volume": self.cluster.volume,
            "logs": f"{self.place}/submission",
            "registry": self.cluster.image.partition("/")[0],
            "binding": f"{MOUNT}:{MOUNT}",
            "image": self.cluster.image,
            "command": run_command(self.study, job.runs, self.place, "python"),
            "name": job.name,
        }
        return f"{job.name}.sh", templates.script("tpu_vm.sh", values)

    def commands(self, job: Job, submitted: Mapping[str, Submitted]) -> list[list[str]]:
        names, hw = self.names, self.hardware
        chips = hw.hosts * hw.chips
        nodes = (
            [f"--node-id={job.name}"] if hw.slices == 1 else [f"--node-count={hw.slices}", f"--node-prefix={job.name}"]
        )
        create = [
            *GCLOUD, "create", job.name, *self._where, *nodes,
            f"--accelerator-type={names.vm}-{chips * names.cores}", f"--runtime-version={names.runtime}",
            f"--metadata-from-file=startup-script={job.name}.sh", *self.options,
        ]  # fmt: skip
        return [*([self._delete(job)] if job.name in submitted else []), create]

    def _delete(self, job: Job) -> list[str]:
        return [*GCLOUD, "delete", job.name, *self._where, "--force", "--quiet"]

    def submitted(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        names = {job.name for job in jobs}
        rows = json.loads(call([*GCLOUD, "list", *self._where, "--format=json"]))
        states = {row["name"].rpartition("/")[2]: row["state"]["state"] for row in rows}
        return {name: Submitted(STATES.get(state, "waiting"), name) for name, state in states.items() if name in names}

    def hint(self, job: Job) -> str:
        return f"when it is done (it costs until then): {shlex.join(self._delete(job))}"
