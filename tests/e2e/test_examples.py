"""The job files in examples/: against their schemas, and against our own command line."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow.training import models

from ultrathink.cli.main import load_command

EXAMPLES = Path(__file__).parents[2] / "examples"
# Options of sbatch as its manual lists them (https://slurm.schedmd.com/sbatch.html).
SBATCH_OPTIONS = {
    *("account", "array", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency"),
    *("error", "exclude", "exclusive", "gpus", "gpus-per-node", "gpus-per-task", "job-name", "mem"),
    *("mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "no-requeue", "ntasks", "output"),
    *("ntasks-per-node", "open-mode", "partition", "qos", "requeue", "reservation", "signal"),
    *("time",),
}


def known_by(model: Any, tree: dict[str, Any]) -> None:
    """Every key of ``tree`` is a field of the operator's model."""
    assert set(tree) <= set(model.attribute_map.values())


def test_the_pytorch_job_is_what_the_operator_reads() -> None:
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    known_by(models.KubeflowOrgV1PyTorchJob, job)
    known_by(models.KubeflowOrgV1PyTorchJobSpec, job["spec"])
    known_by(models.KubeflowOrgV1RunPolicy, job["spec"]["runPolicy"])
    for kind, replicas in job["spec"]["pytorchReplicaSpecs"].items():
        assert kind in ("Master", "Worker")
        known_by(models.KubeflowOrgV1ReplicaSpec, replicas)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}}
        kubernetes_validate.validate({**pod, **replicas["template"]}, "1.33", strict=True)
        [container] = replicas["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        shell, flag, script = container["command"]
        assert subprocess.run([shell, "-n", flag, script], check=False).returncode == 0
        check_launch(script)


def test_the_slurm_script_is_what_sbatch_and_bash_read() -> None:
    path = EXAMPLES / "slurm.sh"
    text = path.read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, flags=re.MULTILINE)
    assert len(options) == text.count("#SBATCH")
    assert set(options) <= SBATCH_OPTIONS
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    check_launch(text.replace("\\\n", " "))


def check_launch(script: str) -> None:
    """``ultrathink launch`` in a script takes the arguments that it is given there."""
    [found] = re.findall(r"ultrathink launch (.*)", script.replace("\n", " "))
    words = shlex.split(re.sub(r"\$\{?\w+(\[@\])?\}?|\$@", "2", found))
    args = load_command("launch")[0].parse(words)
    assert args.nnodes == 2
    assert args.rdzv_endpoint.endswith(":29400")
