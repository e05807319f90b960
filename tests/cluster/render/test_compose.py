"""A compose file is one of the published schema, and its containers' commands train a recipe on two hosts."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml

from lockstep.cluster.recipe.load import load_recipe, parse, to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.compose import RECIPE, TOKENS, ComposeProject, compose_file
from lockstep.cluster.render.nodes import Nodes, RenderError
from lockstep.cluster.render.volumes import Volume
from tests.cluster.cli_process import summary
from tests.cluster.hosts import PYTHON, Host, Hosts, needs_hosts
from tests.cluster.render.schemas import check

TINY = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
PROJECT = ComposeProject("lockstep", volumes=[Volume("runs", PurePosixPath("/runs"))])


def on_volume(**values: object) -> Recipe:
    return parse({"pretrain": {"steps": 1}, "run": "/runs/{name}"} | values)


def rendered(recipe: Recipe, nodes: Nodes, project: ComposeProject = PROJECT) -> dict[str, Any]:
    """The document, with variables as Compose would put them in where none is set."""
    document: dict[str, Any] = yaml.safe_load(compose_file(recipe, nodes, project))
    check("compose-spec", document)
    return _interpolated(document)


def _interpolated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_interpolated(inner) for inner in value]
    return (
        re.sub(r"\$(\$|\w+|\{[^}]*\})", lambda m: "$" if m[1] == "$" else "", value)
        if isinstance(value, str)
        else value
    )


def test_services_are_the_nodes_that_were_asked_for() -> None:
    folder = Volume("/home/me/$x", PurePosixPath("/home/me/$x"))
    project = replace(PROJECT, volumes=[*PROJECT.volumes, folder], variables=["HF_TOKEN"])
    document = rendered(on_volume(), Nodes(3, 4, 2, 16.0), project)
    services = document["services"]
    assert list(services) == ["head", "worker-1", "worker-2"]
    assert list(services["head"]["depends_on"]) == ["worker-1", "worker-2"]
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert document["volumes"] == {"token": {}, "runs": {}}
    devices = []
    for service in services.values():
        assert "HF_TOKEN" in service["environment"]
        assert service["stop_grace_period"] == "180s"
        assert (service["mem_limit"], service["shm_size"]) == ("16384m", "4916m")
        assert [(each["type"], each["target"]) for each in service["volumes"]] == [
            ("volume", TOKENS),
            ("volume", "/runs"),
            ("bind", "/home/me/$x"),
        ]
        devices += service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    assert devices == ["0", "1", "2", "3", "4", "5"]


def test_the_recipe_is_that_of_the_run_whatever_its_name() -> None:
    for name in ("It's\t`id` $HOME ${X:-y} $$ 'x': \"y\" #z\n---\n…", "9" * 300, "-"):
        recipe = on_volume(name=name)
        document = rendered(recipe, Nodes())
        assert document["configs"]["recipe"]["content"] == to_toml(recipe)
        assert re.fullmatch(r"[a-z][a-z0-9-]*", document["name"])
        assert document["services"]["head"]["depends_on"] == {}


def test_the_schema_knows_what_a_service_is() -> None:
    document = rendered(on_volume(), Nodes())
    for wrong in ({"comand": []}, {"stop_grace_period": 5}, {"volumes": [{"type": "nfs"}]}):
        service = document["services"]["head"] | wrong
        with pytest.raises(jsonschema.ValidationError):
            check("compose-spec", document | {"services": {"head": service}})


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({"run": "/home/me/run"}, {}, "run=/home/me/run is on no volume (/runs), and the nodes would not have it"),
        ({}, {"variables": ["HF_TOKEN=x"]}, "env='HF_TOKEN=x' is no name of a variable: give the name alone"),
    ],
)
def test_what_cannot_run_is_refused(values: dict[str, object], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RenderError) as refused:
        compose_file(on_volume(**values), Nodes(), replace(PROJECT, **asked))
    assert words in str(refused.value)


@pytest.mark.parametrize("text", ["runs", ":/runs", "runs:", "runs:runs", "runs:/"])
def test_a_volume_without_source_or_path_is_refused(text: str) -> None:
    with pytest.raises(RenderError, match="is not of the form SOURCE:/path"):
        Volume.parse(text)


@pytest.mark.exhaustive
@needs_hosts
def test_on_two_hosts_the_commands_of_containers_train(hosts: Hosts, tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["layout.data=2", "pretrain.steps=4", f"run={tmp_path}/run"])
    project = replace(PROJECT, volumes=[Volume(str(tmp_path), PurePosixPath(tmp_path))])
    document = rendered(recipe, Nodes(2, cpus=1), project)
    (tmp_path / "recipe.toml").write_text(document["configs"]["recipe"]["content"])
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{hosts[0].address} head\n{hosts[1].address} worker-1\n")

    def started(host: Host, service: dict[str, Any]) -> "subprocess.Popen[bytes]":
        (script,) = service["command"]
        folders = f"mount --bind {tmp_path}/hosts /etc/hosts && mkdir -p /tmp/ray && mount --bind {host.local} /tmp/ray"
        own = [*service["entrypoint"], script.replace(RECIPE, f"{tmp_path}/recipe.toml").replace(TOKENS, str(tmp_path))]
        environment = [each.replace(TOKENS, str(tmp_path)).split("=") for each in service["environment"]]
        variables = dict(environment)
        path = f"{PYTHON.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        inside = ["unshare", "--mount", "sh", "-c", f'{folders} && exec "$@"', "sh", *own]
        return host.start(*inside, log="service.log", PATH=path, **variables)

    started(hosts[1], document["services"]["worker-1"])
    head = started(hosts[0], document["services"]["head"])
    assert head.wait(240) == 0, (hosts[0].folder / "service.log").read_text()
    assert summary(tmp_path / "run")["status"] == "finished"
