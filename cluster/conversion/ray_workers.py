"""Writes the parts of a conversion in tasks of a Ray cluster, whose hosts share the folders of source and target."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from lockstep.cluster.conversion.local_workers import Worked, work
from lockstep.cluster.conversion.plan import Conversion
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.formats.registry import OpenModel


def ray_tasks(
    address: str, conversion: Conversion, opened: OpenModel, folder: Path | Storage, tasks: Sequence[int]
) -> Iterator[Worked]:
    """`Workers` on the Ray cluster at an address: as many tasks at a time as the conversion has workers."""
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    location, folder = (place.absolute() if isinstance(place, Path) else place for place in (opened.location, folder))
    remote, left = partial(ray.remote(work).remote, conversion, location, folder), iter(tasks)
    try:
        running = [remote(task) for task in islice(left, conversion.workers)]
        while running:
            (done, *_), running = ray.wait(running)
            yield ray.get(done)
            running += [remote(task) for task in islice(left, 1)]
    except RayTaskError as error:
        raise error.cause from error
    finally:
        ray.shutdown()
