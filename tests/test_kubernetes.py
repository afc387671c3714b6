"""The Kubernetes manifest against the published schemas, torchrun's parser and megagpt's own; no cluster runs it."""

import copy
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from pydantic import ValidationError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import parse_args

from megagpt.cli import make_parser
from megagpt.commands.options import config_of, parse
from tests.processes import REPOSITORY

Tree = dict[str, Any]
MANIFEST = REPOSITORY / "launch" / "kubernetes.yaml"
POD = "spec.runtimePatches.0.trainingRuntimeSpec.template.spec.replicatedJobs.0.template.spec.template.spec"


@pytest.fixture
def job() -> Tree:
    tree: Tree = yaml.safe_load(MANIFEST.read_text())
    return tree


def at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key) if isinstance(tree, list) else key]
    return tree


def pod_of(job: Tree) -> Tree:
    """The pod that the Trainer makes: the patched pod, with the image, command and environment of `trainer`."""
    spec, trainer = copy.deepcopy(at(job, POD)), job["spec"]["trainer"]
    container = {name: trainer[name] for name in ("image", "command", "args", "env")}
    spec["containers"][0].update(container, resources=trainer["resourcesPerNode"])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": job["metadata"], "spec": spec}


def check_trainjob(job: Tree) -> None:
    """The models refuse wrong types and missing keys, but drop unknown keys: the round trip shows those."""
    parsed = TrainerV1alpha1TrainJob.from_dict(job)
    assert (parsed and parsed.to_dict()) == job


def check_pod(job: Tree) -> None:
    kubernetes_validate.validate(pod_of(job), kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_is_valid(job: Tree) -> None:
    check_trainjob(job)
    check_pod(job)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")


MISSING = object()
BROKEN = {
    "unknown key": ("spec.trainer.nodes", 2),
    "key of an older API": ("spec.podTemplateOverrides", []),
    "pod key that no patch may set": (f"{POD}.restartPolicy", "Never"),
    "container key that no patch may set": (f"{POD}.containers.0.resources", {}),
    "misspelt key deep down": (f"{POD}.volumes.1.emptyDir.sizelimit", "16Gi"),
    "string for a number": ("spec.trainer.numNodes", "2"),
    "number for a string": ("spec.trainer.env.0.value", 1),
    "text for a list": ("spec.trainer.command", "torchrun"),
    "string for seconds": (f"{POD}.terminationGracePeriodSeconds", "600"),
    "no runtimeRef": ("spec.runtimeRef", MISSING),
    "no manager": ("spec.runtimePatches.0.manager", MISSING),
    "no mountPath": (f"{POD}.containers.0.volumeMounts.0.mountPath", MISSING),
    "no claimName": (f"{POD}.volumes.0.persistentVolumeClaim.claimName", MISSING),
}
POD_PARTS = ("misspelt key deep down", "number for a string", "text for a list", "string for seconds", "no mountPath")


def break_at(job: Tree, path: str, value: object) -> None:
    parent, _, key = path.rpartition(".")
    if value is MISSING:
        del at(job, parent)[key]
    else:
        at(job, parent)[key] = value


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_manifest_is_refused(job: Tree, what: str) -> None:
    break_at(job, *BROKEN[what])
    with pytest.raises((ValidationError, AssertionError)):
        check_trainjob(job)


@pytest.mark.parametrize("what", POD_PARTS)
def test_a_broken_pod_is_refused(job: Tree, what: str) -> None:
    break_at(job, *BROKEN[what])
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(job)


def test_the_command_is_a_run_that_divides_over_its_ranks(job: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = job["spec"]["trainer"]
    nodes, ranks = trainer["numNodes"], trainer["numProcPerNode"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == ranks
    # Variables that the torch-distributed runtime sets on the second node.
    runtime = {"NNODES": nodes, "NPROC_PER_NODE": ranks, "NODE_RANK": 1, "MASTER_ADDR": "first", "MASTER_PORT": 29400}
    for name, value in runtime.items():
        monkeypatch.setenv(f"PET_{name}", str(value))
    assert trainer["command"] == ["torchrun"]
    torchrun = parse_args(trainer["args"])
    assert {name: str(getattr(torchrun, name.lower())) for name in runtime} == {n: str(v) for n, v in runtime.items()}
    # By a variable: torchrun of PyTorch 2.11 refuses an option that it does not know.
    variables = {variable["name"]: variable["value"] for variable in trainer["env"]}
    seconds = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))
    if "shutdown_timeout" in LaunchConfig.__annotations__:
        assert LaunchConfig(nodes, nodes, ranks).shutdown_timeout == seconds
    assert 30 < seconds < at(job, POD)["terminationGracePeriodSeconds"]
    assert trainer["args"][0] == torchrun.training_script
    assert (REPOSITORY / torchrun.training_script).is_file()

    arguments = parse(make_parser(), ["train", *torchrun.training_script_args])
    assert arguments.auto_resume
    config = config_of(arguments)
    assert config.run.folder in [mount["mountPath"] for mount in at(job, POD)["containers"][0]["volumeMounts"]]
    assert config.accumulation(nodes * ranks) >= 1
