"""A server of the tiny model, for a module of tests."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.engine import RolloutEngine
from tests.cluster.servers import Running, serving


@pytest.fixture(scope="module")
def server(transformer: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    """It ends with the module."""
    with serving(RolloutEngine(transformer, decode=tokenizer.decode, special=tokenizer.special), tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    """Of the server."""
    return server.client()
