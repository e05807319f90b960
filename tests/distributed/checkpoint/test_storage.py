"""Checkpoints in a real object store, spoken to over HTTP, and URLs that are none."""

import json
import socket
from collections.abc import Iterator

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import BadCheckpoint, Checkpoint, find
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.checkpoint.storage import BadStorage, storage_of
from lockstep.distributed.checkpoint.tensors import whole


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server with a bucket, as TensorStore's JSON."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "lockstep")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        try:
            endpoint = f"http://127.0.0.1:{port}"
            boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="models")
            yield json.dumps({"driver": "s3", "bucket": "models", "endpoint": endpoint, "path": "runs/mine"})
        finally:
            server.stop()


def test_checkpoints_live_in_an_object_store(bucket: str) -> None:
    saver = Saver(bucket, CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        tensors = {"w": torch.full((300, 7), float(step)), "exp_avg/w": torch.arange(5.0) + step}
        chunks = [chunk for name, tensor in tensors.items() for chunk in chunks_of(tensor, name)]
        saver.save(step, chunks, {"kind": "test"}, {"note.txt": "ä"}, wait=step == 2, best=step == 1)
    saver.close()
    place = storage_of(bucket)
    assert sorted(manager.saved(place)) == [1, 2, 3]
    assert (place.pointed("best"), place.pointed("latest")) == ("step-000001", "step-000003")
    stored = Checkpoint(bucket)
    assert (stored.manifest["step"], stored.files) == (3, {"note.txt": "ä"})
    assert (stored.read("w", whole((300, 7))) == 3).all()
    assert stored.read("exp_avg/w", ((1, 3),)).tolist() == [4, 5]
    with pytest.raises(KeyError, match="s3://models/runs/mine/step-000003/arrays has no tensor nothing"):
        stored.read("nothing", ((0, 1),))
    manager.drop_after(place, 0)
    with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
        find(bucket)


@pytest.mark.parametrize("url", ["ftp://models/mine", "s3:models://", '{"driver": "tape"}', '{"driver": '])
def test_a_url_that_is_no_store_is_one_sentence(url: str) -> None:
    with pytest.raises(BadStorage, match="is no key-value store: ") as raised:
        storage_of(url)
    assert "\n" not in str(raised.value)
