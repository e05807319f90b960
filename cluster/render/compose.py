"""A compose file of a head and workers on one machine, which ends with the run.

The head starts last and is stopped first: a run that is told to end saves while its workers are there.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.cluster.launch.ray_settings import RAY_SETTINGS
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import Nodes, RenderError, check_fits, job_name, seconds_to_end
from lockstep.cluster.render.volumes import Volume, check_paths
from lockstep.cluster.render.yaml_text import to_yaml

RECIPE = "/etc/lockstep/recipe.toml"
SHARED_MEMORY = 0.3
"""Share of a node's memory that Ray's object store takes, which lies in shared memory."""
COMMENT = "Run with `docker compose --file FILE up --exit-code-from head`."
TOKENS = "/run/lockstep"
"""Where the volume with the token is mounted that keeps others out of this Ray."""
START = """ulimit -Sn "$(ulimit -Hn)"
node="--disable-usage-stats --node-ip-address=$(getent ahostsv4 {name} | sed -n '1s/ .*//p')"
node="$node --num-cpus={cpus} --num-gpus={gpus}"
"""
HEAD = """[ -s {token} ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > {token})
ray start --head --port=6379 --dashboard-host=0.0.0.0 $node
python -m lockstep.cluster.render.joined_nodes head:6379 {count}
exec python -m lockstep train {recipe} --address head:6379{resume}
"""
WORKER = """until (exec 3<>/dev/tcp/head/6379) 2>/dev/null; do sleep 1; done
exec ray start --address=head:6379 --block $node
"""


@dataclass(frozen=True)
class ComposeProject:
    """What a job asks of Docker, beside nodes."""

    image: str
    """With Lockstep installed, such as the Dockerfile makes it."""
    volumes: Sequence[Volume] = ()
    """Named volumes, and folders of this machine by their path."""
    variables: Sequence[str] = ()
    """Names of variables whose values are taken from the environment in which the project is started."""
    resume: bool = False
    """Go on from the run's last checkpoint."""


def compose_file(recipe: Recipe, nodes: Nodes, project: ComposeProject) -> str:
    """The file of a project, to be given to `docker compose`.

    Raises:
        RenderError: when the recipe cannot run so; one sentence.
    """
    check_fits(recipe, nodes)
    check_paths(recipe, project.volumes)
    for name in project.variables:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RenderError(f"env={name!r} is no name of a variable: give the name alone, as in HF_TOKEN")
    names = ["head", *(f"worker-{number}" for number in range(1, nodes.count))]
    services = {name: _service(recipe, nodes, project, name, number) for number, name in enumerate(names)}
    services["head"]["ports"] = ["127.0.0.1:8265:8265"]
    services["head"]["depends_on"] = {name: {"condition": "service_started"} for name in names[1:]}
    document: dict[str, Any] = {"name": job_name(recipe, 60), "services": services}
    document["configs"] = {"recipe": {"content": _literal(to_toml(recipe))}}
    named = [volume.source for volume in project.volumes if not _is_folder(volume)]
    document["volumes"] = {name: {} for name in ("token", *named)}
    return to_yaml([document], COMMENT)


def _service(recipe: Recipe, nodes: Nodes, project: ComposeProject, name: str, number: int) -> dict[str, Any]:
    """The container of a node; that with number 0 has the head."""
    token, resume = f"{TOKENS}/token", " --resume" if project.resume else ""
    script = (START + (HEAD, WORKER)[number > 0]).format(
        name=name, cpus=nodes.cpus, gpus=nodes.gpus, count=nodes.count, recipe=RECIPE, resume=resume, token=token
    )
    variables = RAY_SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    service: dict[str, Any] = {
        "image": project.image,
        "init": True,
        "entrypoint": ["bash", "-euc"],
        "command": [_literal(script)],
        "environment": [*(f"{key}={value}" for key, value in variables.items()), *project.variables],
        "configs": [{"source": "recipe", "target": RECIPE}],
        "volumes": [
            {"type": "volume", "source": "token", "target": TOKENS},
            *(_mount(volume) for volume in project.volumes),
        ],
        "stop_grace_period": f"{seconds_to_end(recipe)}s",
    }
    if nodes.memory:
        mebibytes = math.ceil(nodes.memory * 1024)
        service |= {"mem_limit": f"{mebibytes}m", "shm_size": f"{math.ceil(mebibytes * SHARED_MEMORY)}m"}
    if nodes.gpus:
        devices = [str(number * nodes.gpus + each) for each in range(nodes.gpus)]
        device = {"driver": "nvidia", "device_ids": devices, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _mount(volume: Volume) -> dict[str, Any]:
    kind = "bind" if _is_folder(volume) else "volume"
    return {"type": kind, "source": _literal(volume.source), "target": _literal(str(volume.path))}


def _is_folder(volume: Volume) -> bool:
    return volume.source.startswith("/")


def _literal(text: str) -> str:
    """Text in which Compose finds no variables."""
    return text.replace("$", "$$")
