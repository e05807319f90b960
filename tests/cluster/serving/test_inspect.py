"""An agent of inspect-ai calls a tool through the server; skipped where inspect-ai is not installed."""

from pathlib import Path
from typing import Literal

import pytest

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from tests.cluster.servers import MODEL, serving_tools

pytest.importorskip("inspect_ai")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageTool, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, ToolFunction, tool


@tool
def temperature() -> Tool:
    async def execute(city: Literal["Oslo", "Rome"], hour: Literal[6, 18]) -> str:
        """Say how warm it is.

        Args:
            city: Where.
            hour: When.
        """
        return f"{len(city) + hour} degrees"

    return execute


def test_an_agent_calls_a_tool_and_goes_on_with_its_result(
    tokenizer: Tokenizer, groups: Groups, tmp_path: Path
) -> None:
    with serving_tools(tokenizer, groups) as server:
        model = get_model(
            f"openai-api/lockstep/{MODEL}",
            base_url=f"{server.url}/v1",
            api_key="none",
            config=GenerateConfig(max_tokens=200, seed=1, parallel_tool_calls=False),
        )
        task = Task(
            dataset=[Sample(input="How warm is it in Oslo?", target="degrees")],
            solver=[use_tools(temperature(), tool_choice=ToolFunction("temperature")), generate()],
            scorer=includes(),
        )
        [log] = eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert log.samples is not None
    asked, called, told, answered = log.samples[0].messages
    [call] = called.tool_calls
    assert call.function == "temperature"
    assert call.arguments["city"] in ("Oslo", "Rome")
    assert isinstance(told, ChatMessageTool)
    assert told.tool_call_id == call.id
    assert told.text == f"{len(call.arguments['city']) + call.arguments['hour']} degrees"
    assert answered.role == "assistant"
    assert asked.role == "user"
