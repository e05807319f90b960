"""The commands `lockstep render slurm`, `lockstep render rayjob` and `lockstep render compose`."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cluster.commands.console import err, sentences
from lockstep.cluster.commands.options import Overrides, RecipeName, overriding

app = typer.Typer(no_args_is_help=True, help="What Slurm, KubeRay and Docker take, to read before it is applied.")

Count = Annotated[int, typer.Option("--nodes", min=1, help="Nodes, that of the head included.")]
Cpus = Annotated[int, typer.Option(min=1, help="Cores of each node.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each node.")]
Memory = Annotated[
    float | None, typer.Option(min=0.001, help="GiB of each node; the default of the scheduler otherwise.")
]
Output = Annotated[Path | None, typer.Option(help="A file to write; printed otherwise.")]
Image = Annotated[str, typer.Option(help="An image with Lockstep in it, such as the Dockerfile makes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]


@app.command()
@sentences
def slurm(
    recipe: RecipeName,
    hours: Annotated[float, typer.Option(min=0, help="Time limit of each allocation.")],
    overrides: Overrides = None,
    nodes: Count = 1,
    cpus: Cpus = 8,
    gpus: Gpus = 0,
    memory: Memory = None,
    partition: Annotated[str, typer.Option(help="Slurm's partition.")] = "",
    account: Annotated[str, typer.Option(help="Slurm's account.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="Another option of sbatch, as in --option=--qos=high.")
    ] = None,
    container: Annotated[str, typer.Option(help="An image for Pyxis; the nodes' own Python runs otherwise.")] = "",
    mount: Annotated[list[str] | None, typer.Option(help="SOURCE:PATH to mount in the container.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter on the nodes.", show_default="this one")] = "",
    interface: Annotated[
        str, typer.Option(help="Network interface of the nodes.", show_default="by the route between them")
    ] = "",
    scratch: Annotated[str, typer.Option(help="A short folder on each node's own disk.")] = "/tmp",
    requeues: Annotated[
        int, typer.Option(min=0, help="How often the run goes on after its time is over or a node is lost.")
    ] = 3,
    resume: Resume = False,
    output: Output = None,
) -> None:
    """Write an sbatch script that starts Ray on its allocation, trains the recipe there, saves in time and goes on.

    Example: lockstep render slurm quickstart --nodes 2 --cpus 16 --gpus 8 --hours 12 --set checkpoints.every=5
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.render.nodes import Nodes
    from lockstep.cluster.render.slurm import SlurmJob, sbatch_script

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    job = SlurmJob(
        hours=hours,
        partition=partition,
        account=account,
        options=option or [],
        container=container,
        mounts=mount or [],
        python=python,
        interface=interface,
        scratch=scratch,
        requeues=requeues,
        resume=resume,
    )
    _write(sbatch_script(resolved, Nodes(nodes, cpus, gpus, memory), job), output)


@app.command()
@sentences
def rayjob(
    recipe: RecipeName,
    image: Image,
    overrides: Overrides = None,
    nodes: Count = 1,
    cpus: Cpus = 8,
    gpus: Gpus = 0,
    memory: Memory = None,
    volume: Annotated[list[str] | None, typer.Option(help="CLAIM:/path of a persistent volume claim to mount.")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="A secret whose keys become variables, by its name.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often the run goes on when it has failed.")] = 0,
    keep: Annotated[int, typer.Option(min=0, help="Seconds that the cluster stays after the run.")] = 600,
    output: Output = None,
) -> None:
    """Write a RayJob for KubeRay, with the recipe in a ConfigMap.

    Example: lockstep render rayjob quickstart --image lockstep --volume shared:/shared --set run=/shared/runs/{name}
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.render.nodes import Nodes
    from lockstep.cluster.render.rayjob import KubernetesJob, rayjob_manifest
    from lockstep.cluster.render.volumes import Volume

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    volumes = [Volume.parse(each) for each in volume or []]
    job = KubernetesJob(image=image, volumes=volumes, secrets=secret or [], retries=retries, keep=keep)
    _write(rayjob_manifest(resolved, Nodes(nodes, cpus, gpus, memory), job), output)


@app.command()
@sentences
def compose(
    recipe: RecipeName,
    image: Image,
    overrides: Overrides = None,
    nodes: Count = 1,
    cpus: Cpus = 8,
    gpus: Gpus = 0,
    memory: Memory = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="NAME:/path of a volume, or FOLDER:/path of this machine's.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="A variable that containers get from who starts them, by its name.")
    ] = None,
    resume: Resume = False,
    output: Output = None,
) -> None:
    """Write a compose file of a head and workers, which ends with the run.

    Example: lockstep render compose quickstart --image lockstep --volume runs:/runs --set run=/runs/{name}
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.render.compose import ComposeProject, compose_file
    from lockstep.cluster.render.nodes import Nodes
    from lockstep.cluster.render.volumes import Volume

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    volumes = [Volume.parse(each) for each in volume or []]
    project = ComposeProject(image=image, volumes=volumes, variables=env or [], resume=resume)
    _write(compose_file(resolved, Nodes(nodes, cpus, gpus, memory), project), output)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    output.write_text(text, encoding="utf-8")
    err.print(f"wrote {output}")
