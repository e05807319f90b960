"""One generation step, traced: shape of the embeddings, logits, probabilities at a temperature, and the drawn token.

The text's embeddings [T, width] go through the layers; the last row times the head gives the logits z, and
p_i = exp(z_i / τ) / Σ_j exp(z_j / τ) (Part 3.1 and the worked example of arXiv:2602.00426). The draw inverts the
cumulative distribution at one uniform number of (seed, sample, position): it is the first token of the engine's
completion, whose log-probability the engine reports. JSON lines have the trace; the table has its numbers.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lockstep.cluster.evaluation.studies.study import Study, StudySettings, Subject, Values
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import COLDEST, LARGEST, SamplingParams
from lockstep.rl.rollout.protocol import Request, TokenOutput


class StepSettings(StudySettings):
    """Settings of the study."""

    temperature: tuple[Annotated[float, Field(ge=COLDEST, le=LARGEST)], ...] = Field(
        (0.3, 0.7, 1.0, 1.5), min_length=1, description="temperatures to draw at"
    )
    prompt: str = Field("The capital of France is", min_length=1, description="the text, which is continued as it is")
    top: int = Field(5, ge=1, description="tokens of the trace, the likeliest first")


def measure(subject: Subject, settings: StepSettings, temperature: float, seed: int) -> Values:
    """Trace the step behind the prompt."""
    tokens = tuple(subject.tokenizer.encode_prompt(settings.prompt))
    embeddings, logits_V = traced(subject.engine.transformer, tokens)
    p_V = tempered(logits_V.double(), temperature)
    drawn = _drawn(subject, tokens, temperature, seed)
    top = p_V.topk(min(settings.top, len(p_V))).indices.tolist()
    return {
        "tokens": list(tokens),
        "embeddings": list(embeddings),
        "logits": [
            {"token": t, "text": subject.engine.decode([t]), "logit": float(logits_V[t]), "p": float(p_V[t])}
            for t in top
        ],
        "drawn": {"token": drawn.token, "text": subject.engine.decode([drawn.token])},
        "p of the likeliest": float(p_V.max()),
        "p of the drawn": float(p_V[drawn.token]),
        "entropy": float(torch.special.entr(p_V).sum()),
        "engine's difference": abs(float(p_V[drawn.token].log()) - drawn.logp),
    }


def tempered(logits_V: Tensor, temperature: float) -> Tensor:
    """Probabilities [V]: the softmax of logits divided by a temperature above 0."""
    return (logits_V / temperature).softmax(-1)


@torch.inference_mode()
def traced(transformer: Transformer, tokens: tuple[int, ...]) -> tuple[tuple[int, int], Tensor]:
    """The shape of a text's embeddings, [T, width], and the logits [V] behind it, from a pass without a cache."""
    shapes = list[tuple[int, int]]()
    hook = transformer.embedding.register_forward_hook(lambda _, __, x: shapes.append((len(x), x.shape[-1])))
    try:
        device = transformer.embedding.weight.device
        text = torch.tensor(tokens, device=device)
        attend = DocumentAttention([[len(tokens)]], device)
        hidden = transformer(text, torch.arange(len(tokens), device=device), attend)
    finally:
        hook.remove()
    model = transformer.model
    logits_KV = local_logits(hidden[-1], transformer.inference_head, 0, model.vocabulary, model.logit_cap)
    return shapes[0], logits_KV[0, : model.vocabulary].float()


def _drawn(subject: Subject, tokens: tuple[int, ...], temperature: float, seed: int) -> TokenOutput:
    """The engine's own first token behind a text."""
    sampling = SamplingParams(temperature=temperature, max_new_tokens=1)
    subject.engine.add(Request("step", tokens, sampling, seed, 0))
    (output,) = subject.engine.step()
    assert isinstance(output, TokenOutput), output
    return output


STUDY = Study(
    settings=StepSettings,
    axis="temperature",
    units={
        "p of the likeliest": "",
        "p of the drawn": "",
        "entropy": "nats",
        "engine's difference": "nats, of the drawn token's log-probability",
    },
    measure=measure,
)
