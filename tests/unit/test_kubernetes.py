"""launch/cluster/kubernetes/: every key of every manifest is one that Kubernetes and its operators know, with a value
of its type, and what they start is what launch/cluster/node.sh needs.

The models of JobSet and of Kubernetes' own objects are those of the package kubeflow-trainer-api, made from the
schemas; from_dict drops what they don't know, so what comes back is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "launch/cluster/kubernetes").glob("*.yaml"))
KINDS = {
    ("v1", "Secret"): "IoK8sApiCoreV1Secret",
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobsetV1alpha2JobSet",
}
# of PyTorchJob, but for the pods: the fields of kubeflow_org_v1_{py_torch_job_spec,run_policy,replica_spec} 1.9.4
PYTORCHJOB = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
RUN_POLICY = {
    *("activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend"),
    "ttlSecondsAfterFinished",
}
REPLICAS = {"replicas", "restartPolicy", "template"}


def unknown(given: Any, known: Any, where: str = "") -> Iterator[str]:
    """Keys of ``given`` that didn't come back."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(known, dict) or key not in known:
                yield f"{where}.{key}"
            else:
                yield from unknown(value, known[key], f"{where}.{key}")
    elif isinstance(given, list):
        for number, (value, other) in enumerate(zip(given, known, strict=True)):
            yield from unknown(value, other, f"{where}[{number}]")


def check(name: str, given: dict) -> None:
    assert not list(unknown(given, getattr(models, name).from_dict(given).to_dict()))


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


def check_manifest(text: str) -> None:
    for document in documents(text):
        kind = (document["apiVersion"], document["kind"])
        if kind in KINDS:
            check(KINDS[kind], document)
            continue
        assert kind == ("kubeflow.org/v1", "PyTorchJob") and document.keys() == {
            *("apiVersion", "kind", "metadata", "spec")
        }
        spec = document["spec"]
        assert spec.keys() <= PYTORCHJOB and spec["runPolicy"].keys() <= RUN_POLICY
        assert spec["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
        for replicas in spec["pytorchReplicaSpecs"].values():
            assert replicas.keys() <= REPLICAS
            check("IoK8sApiCoreV1PodTemplateSpec", replicas["template"])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_one(manifest):
    check_manifest(manifest.read_text())


def test_the_check_sees_what_is_wrong():
    text = next(path for path in MANIFESTS if path.name == "jobset.yaml").read_text()
    for right, wrong in (
        ("terminationGracePeriodSeconds", "terminationGraceSeconds"),
        ("maxRestarts: 20", "maxRestarts: often"),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_manifest(text.replace(right, wrong))


def containers(document: dict) -> Iterator[dict]:
    spec = document.get("spec", {})
    jobs = [job["template"]["spec"]["template"] for job in spec.get("replicatedJobs", [])]
    jobs += [replicas["template"] for replicas in spec.get("pytorchReplicaSpecs", {}).values()]
    return (container for template in jobs for container in template["spec"]["containers"])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_every_node_is_told_what_it_needs(manifest):
    script = (ROOT / "launch/cluster/node.sh").read_text()
    needed = set(re.findall(r'"\$\{(GR_\w+):\?\}"', script))
    assert needed == {"GR_NODES", "GR_NODE", "GR_MEETING", "GR_JOB"}
    found = [one for document in documents(manifest.read_text()) for one in containers(document)]
    assert found
    for container in found:
        (command,) = container["args"]
        said = {variable["name"] for variable in container["env"]} | set(re.findall(r"(GR_\w+)=", command))
        assert needed <= said and "bash launch/cluster/node.sh" in command
        assert {"GR_RESTART", "RAY_AUTH_TOKEN", "GR_ADDRESS"} <= said
