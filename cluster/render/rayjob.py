"""A KubeRay RayJob that trains a recipe on a Ray cluster of its own, with the recipe in a ConfigMap beside it.

The operator submits the job over HTTP, so that no pod that follows a log can end it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from lockstep.cluster.launch.ray_settings import RAY_SETTINGS
from lockstep.cluster.process_identity import JOB
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import Nodes, RenderError, check_fits, check_goes_on, job_name, seconds_to_end
from lockstep.cluster.render.volumes import Volume, check_paths
from lockstep.cluster.render.yaml_text import to_yaml

LONGEST_NAME = 47
"""Characters of a RayJob's name, to which KubeRay adds its own."""
FOLDER = "/etc/lockstep"
"""Where the recipe is mounted."""
COMMENT = "Apply with `kubectl apply --filename`, end with `kubectl delete`."


@dataclass(frozen=True)
class KubernetesJob:
    """What a job asks of Kubernetes, beside nodes."""

    image: str
    """With Lockstep installed, such as the Dockerfile makes it."""
    volumes: Sequence[Volume] = ()
    """Persistent volume claims."""
    secrets: Sequence[str] = ()
    """Whose keys are variables of all pods."""
    retries: int = 0
    """How often the run goes on in a new Ray cluster when it has failed."""
    keep: int = 600
    """Seconds that the cluster stays after the run, for a look at its logs."""


def rayjob_manifest(recipe: Recipe, nodes: Nodes, job: KubernetesJob) -> str:
    """The manifests of a job, to be given to `kubectl apply`.

    Raises:
        RenderError: when the recipe cannot run so; one sentence.
    """
    check_fits(recipe, nodes)
    check_paths(recipe, job.volumes)
    if job.retries:
        check_goes_on(recipe, f"retries={job.retries}")
    for name in (*job.secrets, *(volume.source for volume in job.volumes)):
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
            raise RenderError(
                f"{name!r} is no name of a secret or a claim: give small letters, digits, dots and hyphens"
            )
    name = job_name(recipe, LONGEST_NAME)
    configuration = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"recipe.toml": to_toml(recipe)},
    }
    return to_yaml([configuration, _rayjob(name, recipe, nodes, job)], COMMENT)


def _rayjob(name: str, recipe: Recipe, nodes: Nodes, job: KubernetesJob) -> dict[str, Any]:
    # Ray kills a job that is stopped after 3 s, and the run saves first.
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(seconds_to_end(recipe))}}
    spec = {
        # A second attempt begins as the first did, so that each goes on from what is saved.
        "entrypoint": f"python -m lockstep train {FOLDER}/recipe.toml{' --resume' if job.retries else ''}",
        "submissionMode": "HTTPMode",
        "runtimeEnvYAML": yaml.safe_dump(environment),
        "backoffLimit": job.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": job.keep,
        "rayClusterSpec": _cluster(name, recipe, nodes, job),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}


def _cluster(name: str, recipe: Recipe, nodes: Nodes, job: KubernetesJob) -> dict[str, Any]:
    ports = [{"containerPort": port, "name": what} for port, what in ((6379, "gcs-server"), (8265, "dashboard"))]
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # which the operator makes
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "template": _pod(name, recipe, nodes, job, {"name": "ray-head", "ports": ports}),
        },
    }
    if nodes.count > 1:
        workers = {"groupName": "workers", "replicas": nodes.count - 1, "minReplicas": nodes.count - 1}
        workers |= {"maxReplicas": nodes.count - 1, "rayStartParams": {}}
        pod = _pod(name, recipe, nodes, job, {"name": "ray-worker"})
        cluster["workerGroupSpecs"] = [workers | {"template": pod}]
    return cluster


def _pod(name: str, recipe: Recipe, nodes: Nodes, job: KubernetesJob, container: dict[str, Any]) -> dict[str, Any]:
    amounts: dict[str, str | int] = {"cpu": nodes.cpus}
    if nodes.memory:
        amounts["memory"] = f"{math.ceil(nodes.memory * 1024)}Mi"
    if nodes.gpus:
        amounts["nvidia.com/gpu"] = nodes.gpus
    namespace = {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
    variables = RAY_SETTINGS | {JOB: f"rayjob-$(NAMESPACE)-{name}"}
    mounts = [{"name": "recipe", "mountPath": FOLDER, "readOnly": True}]
    volumes: list[dict[str, Any]] = [{"name": "recipe", "configMap": {"name": name}}]
    for number, volume in enumerate(job.volumes):
        mounts.append({"name": f"volume-{number}", "mountPath": str(volume.path)})
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": volume.source}})
    container = container | {
        "image": job.image,
        "env": [namespace, *({"name": key, "value": value} for key, value in variables.items())],
        "envFrom": [{"secretRef": {"name": secret}} for secret in job.secrets],
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": mounts,
    }
    return {
        "spec": {
            "terminationGracePeriodSeconds": seconds_to_end(recipe),
            "containers": [container],
            "volumes": volumes,
        }
    }
