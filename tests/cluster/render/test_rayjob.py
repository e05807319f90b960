"""A RayJob is one of KubeRay's published schema, and names what it needs by reference."""

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml

from lockstep.cluster.recipe.load import parse, to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import Nodes, RenderError
from lockstep.cluster.render.rayjob import KubernetesJob, rayjob_manifest
from lockstep.cluster.render.volumes import Volume
from tests.cluster.render.schemas import check

JOB = KubernetesJob("registry/lockstep:1", volumes=[Volume("shared", PurePosixPath("/shared"))])


def on_volume(**values: object) -> Recipe:
    return parse({"pretrain": {"steps": 1}, "run": "/shared/runs/{name}", "checkpoints": {"every": 5}} | values)


def rendered(recipe: Recipe, nodes: Nodes, job: KubernetesJob = JOB) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the RayJob."""
    configuration, rayjob = yaml.safe_load_all(rayjob_manifest(recipe, nodes, job))
    check("kuberay-rayjob", rayjob)
    return configuration, rayjob


def test_pods_are_the_nodes_that_were_asked_for() -> None:
    job = replace(JOB, secrets=["hub", "wandb"], retries=2)
    _, rayjob = rendered(on_volume(layout={"data": 16}), Nodes(2, 32, 8, 256.0), job)
    spec, cluster = rayjob["spec"], rayjob["spec"]["rayClusterSpec"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"], spec["submissionMode"]) == (2, True, "HTTPMode")
    assert spec["entrypoint"] == "python -m lockstep train /etc/lockstep/recipe.toml --resume"
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "180"}}
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        (container,) = template["spec"]["containers"]
        assert container["image"] == "registry/lockstep:1"
        assert container["resources"]["limits"] == {"cpu": 32, "memory": "262144Mi", "nvidia.com/gpu": 8}
        assert {"name": "LOCKSTEP_JOB", "value": "rayjob-$(NAMESPACE)-run"} in container["env"]
        assert container["env"][0]["name"] == "NAMESPACE", "variables are put into those that come after them"
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}, {"secretRef": {"name": "wandb"}}]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/etc/lockstep", "/shared"}
        assert template["spec"]["volumes"][1]["persistentVolumeClaim"] == {"claimName": "shared"}


def test_the_recipe_is_that_of_the_run_whatever_its_name() -> None:
    for name in ("It's\t`id` $(HOME) 'x': \"y\" #z\n---\n…", "9" * 300, "-", "Größe"):
        recipe = on_volume(name=name)
        configuration, rayjob = rendered(recipe, Nodes())
        assert configuration["data"]["recipe.toml"] == to_toml(recipe)
        named = rayjob["metadata"]["name"]
        assert configuration["metadata"]["name"] == named
        assert len(named) <= 47
        assert named[0].isalpha()
        assert named.replace("-", "").isalnum()
        assert named.isascii()
        assert "workerGroupSpecs" not in rayjob["spec"]["rayClusterSpec"]


def test_the_schema_knows_what_a_rayjob_is() -> None:
    _, rayjob = rendered(on_volume(), Nodes())
    for wrong in ({"entrypoint": 5}, {"shutDownAfterJobFinishes": True}, {"rayClusterSpec": {"headGroupSpec": {}}}):
        with pytest.raises(jsonschema.ValidationError):
            check("kuberay-rayjob", rayjob | {"spec": rayjob["spec"] | wrong})


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({"run": "/home/me/run"}, {}, "run=/home/me/run is on no volume (/shared), and the nodes would not have it"),
        ({"checkpoints": {"at": "/data/x"}}, {}, "checkpoints.at=/data/x is on no volume"),
        (
            {"pretrain": {"steps": 1, "data": {"blend": [{"path": "/c"}]}}},
            {},
            "pretrain.data.blend[0].path=/c is on no volume",
        ),
        ({}, {"volumes": []}, "is on no volume (none is mounted)"),
        ({"checkpoints": {}}, {"retries": 1}, "retries=1 with checkpoints.every=0 would begin with step 1 again"),
        ({}, {"secrets": ["Hub"]}, "'Hub' is no name of a secret or a claim"),
    ],
)
def test_what_cannot_run_is_refused(values: dict[str, object], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RenderError) as refused:
        rayjob_manifest(on_volume(**values), Nodes(), replace(JOB, **asked))
    assert words in str(refused.value)
