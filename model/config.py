"""The configuration of a transformer: one field for each thing in which model families differ."""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lockstep.distributed.layout import Layout, LayoutError, check_divides, splits_heads
from lockstep.model.rope import Rope

Numerics = Literal["fast", "exact"]
"""Whether sums have the fastest order, or a batch-invariant one that gives rollouts and training the same bits."""


Head = Literal["vocabulary", "value"]
"""The output layer: a logit for each token of the vocabulary, or one value per token (critics, reward models)."""


MOST_LAYERS, MOST_EXPERTS, WIDEST, LARGEST = 10_000, 1 << 20, 1 << 24, 10**14
"""Layers, experts of all layers, elements of a row, and parameters of a model at most: beyond, a file is damaged."""


class UnknownModel(ValueError):
    """A model architecture that Lockstep does not support."""


def refuse(feature: str, present: Any) -> None:
    """Raise UnknownModel if a checkpoint uses an unsupported feature."""
    if present:
        raise UnknownModel(f"this checkpoint uses {' '.join(feature.split())}, which is not supported")


def need(words: dict[str, Any], *names: str) -> None:
    """Raise UnknownModel if a `config.json`, or a part of one, lacks some of these keys."""
    missing = [name for name in names if words.get(name) is None]
    if missing:
        raise UnknownModel(f"config.json lacks {', '.join(missing)}")


class MoEConfig(BaseModel):
    """The mixture of experts that replaces the feed-forward layer of every block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int = Field(ge=1, description="in each block")
    experts_per_token: int = Field(ge=1, description="that the router sends each token to")
    intermediate: int = Field(ge=1, description="width of one expert")
    shared_intermediate: int = Field(0, ge=0, description="width of an expert that all tokens visit; 0 for none")
    shared_gate: bool = Field(False, description="whether a sigmoid of the token scales the shared expert")
    normalize: bool = Field(True, description="whether the probabilities of a token's experts are made to add up to 1")
    balance_coefficient: float = Field(0.0, ge=0, description="of the loss that evens the experts' load")
    z_coefficient: float = Field(0.0, ge=0, description="of the loss that keeps the router's logits small")

    @model_validator(mode="after")
    def _is_possible(self) -> "MoEConfig":
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is more than experts={self.experts}")
        if self.shared_gate and not self.shared_intermediate:
            raise ValueError("shared_gate=true scales a shared expert: give shared_intermediate, too")
        return self

    @property
    def has_loss(self) -> bool:
        """Whether the router has auxiliary losses."""
        return bool(self.balance_coefficient or self.z_coefficient)

    def parameters(self, width: int) -> int:
        """Number of parameters of one block's router and experts."""
        rows = 3 * (self.experts * self.intermediate + self.shared_intermediate) + self.experts + self.shared_gate
        return rows * width

    def idle_parameters(self, width: int) -> int:
        """Number of parameters of one block's experts that a token is not routed to."""
        return 3 * (self.experts - self.experts_per_token) * self.intermediate * width


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A linear layer inside of a block, by its name in logical tensors (Hugging Face's names)."""


class LoraConfig(BaseModel):
    """LoRA: a layer's weight becomes W + scale · B · A (Hu et al. 2021, section 4.1).

    B is initialised to 0, so that nothing changes at first; A is random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, ge=1, description="rows of A and columns of B")
    alpha: float = Field(16.0, gt=0, description="the scale is alpha / rank")
    rslora: bool = Field(False, description="the scale is alpha / √rank (Kalajdzievski 2023)")
    targets: tuple[Projection, ...] | Literal["all"] = Field("all", description="linear layers that have adapters")

    @property
    def scale(self) -> float:
        """The factor of B · A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class ModelConfig(BaseModel):
    """The architecture of a decoder-only transformer. The defaults are Llama's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str = Field("llama", description="Hugging Face's model_type: the words of its files, not its arithmetic")
    layers: int = Field(ge=1, le=MOST_LAYERS, description="blocks")
    width: int = Field(ge=1, le=WIDEST, description="of the residual stream (hidden size)")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key-value heads; fewer than query heads are shared by groups of them")
    head_dim: int = Field(ge=2, description="width of a head")
    intermediate: int = Field(ge=1, le=WIDEST, description="width of the feed-forward layer")
    vocabulary: int = Field(ge=2, description="tokens that there are")
    context: int = Field(ge=1, description="longest sequence, in tokens")
    activation: Literal["silu", "gelu", "gelu_tanh"] = Field("silu", description="of the feed-forward layer")
    gated: bool = Field(True, description="whether the activation multiplies a second projection")
    biases: tuple[Literal["qkv", "out", "mlp"], ...] = Field((), description="linear layers that have biases")
    norm: Literal["rms", "rms_offset", "layer"] = Field("rms", description="rms_offset scales by 1 + its weight")
    norm_at: Literal["before", "after", "around"] = Field("before", description="attention and the feed-forward layer")
    norm_eps: float = Field(1e-5, description="added to the mean square, or the variance, in norms")
    qk_norm: Literal["head", "width"] | None = Field(
        None, description="norm of queries and keys: of each head alone, or of all heads together"
    )
    query_scalar: float | None = Field(None, gt=0, description="scores are divided by its root, else by head_dim's")
    attention_cap: float | None = Field(None, gt=0, description="scores s become cap · tanh(s / cap)")
    logit_cap: float | None = Field(None, gt=0, description="logits likewise")
    window: int | None = Field(None, ge=1, description="tokens that a layer sees, its own included; all otherwise")
    full_layers: tuple[int, ...] = Field((), description="layers that see all tokens in spite of the window")
    rope: Rope | None = Field(Rope(), description='rotary positions; "learned" for those that are added to embeddings')
    window_rope: Rope | None = Field(None, description="of the layers with a window, where it is another")
    unrotated_layers: tuple[int, ...] = Field((), description="layers without rotary positions")
    embedding_scale: float = Field(1.0, gt=0, description="what embeddings are multiplied by")
    head: Head = Field("vocabulary", description="a logit for each token, or one value per token, as critics have")
    tied: bool = Field(True, description="whether the head's weights are the embedding's")
    bos_token: int | None = Field(None, description="the token that begins a text, by its number")
    eos_tokens: tuple[int, ...] = Field((), description="tokens that end a text, by their numbers")
    moe: MoEConfig | None = Field(None, description="experts in place of the feed-forward layer, in every block")
    lora: LoraConfig | None = Field(None, description="adapters that the model has beside its weights")

    @field_validator("rope", mode="before")
    @classmethod
    def _learned_is_none(cls, given: Any) -> Any:
        return None if given == "learned" else given

    @model_serializer(mode="wrap")
    def _none_is_learned(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write `rope = None` as "learned", because TOML has no null."""
        return serialized(self) | ({"rope": "learned"} if self.rope is None else {})

    @model_validator(mode="before")
    @classmethod
    def _reads_files(cls, given: Any) -> Any:
        """Accept lists for tuples, and the key `rope_theta` of checkpoints of version 0.1 for `rope`."""
        if not isinstance(given, dict):
            return given
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        theta = values.pop("rope_theta", None)
        return values if theta is None else {"rope": {"theta": theta}} | values

    @model_validator(mode="after")
    def _is_possible(self) -> "ModelConfig":
        strange = [name for name in self.adapted if name not in self.projections]
        named = {*self.full_layers, *self.unrotated_layers}
        faults: dict[str, Any] = {
            f"heads={self.heads} of head_dim={self.head_dim} make a width beyond {WIDEST}": (
                self.heads * self.head_dim > WIDEST
            ),
            f"it has more than {MOST_EXPERTS} experts, or one is wider than {WIDEST}": self.moe
            and (
                self.layers * self.moe.experts > MOST_EXPERTS
                or max(self.moe.intermediate, self.moe.shared_intermediate) > WIDEST
            ),
            f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}": self.heads % self.kv_heads,
            f"head_dim={self.head_dim} is odd, and rotary positions turn pairs": self.rope and self.head_dim % 2,
            f"qk_norm={self.qk_norm!r} needs norm='rms'{', or rms_offset' if self.qk_norm == 'head' else ''}": (
                self.norm not in {None: (self.norm,), "head": ("rms", "rms_offset"), "width": ("rms",)}[self.qk_norm]
            ),
            "rope is None, and window_rope or unrotated_layers is given": (
                self.rope is None and (self.window_rope or self.unrotated_layers)
            ),
            "window is None, and full_layers or window_rope is given": (
                self.window is None and (self.full_layers or self.window_rope)
            ),
            "head='value' and tied=True, and a value head shares nothing with the embedding": (
                self.head == "value" and self.tied
            ),
            f"lora.targets names {', '.join(strange)}, and adapters are for {', '.join(self.projections)}": strange,
            "lora.targets is empty": self.lora and not self.lora.targets,
            "lora.targets='all', and experts have no adapters: name the projections of attention": (
                self.moe and self.lora and self.lora.targets == "all"
            ),
            f"full_layers or unrotated_layers names a layer outside 0 … {self.layers - 1}": (
                not named <= set(range(self.layers))
            ),
            "moe is given, and experts are gated by silu and have no biases": (
                self.moe and (not self.gated or self.activation != "silu" or "mlp" in self.biases)
            ),
            f"it has more than {LARGEST:.0e} parameters": self.parameters > LARGEST,
        }
        for fault, present in faults.items():
            if present:
                raise UnknownModel(f"there is no such model: {fault}")
        return self

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer sees, its own included; None for all."""
        return None if layer in self.full_layers else self.window

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer, or None."""
        if layer in self.unrotated_layers:
            return None
        return self.rope if self.window_of(layer) is None else self.window_rope or self.rope

    def with_head(self, head: Head) -> "ModelConfig":
        """The same model with this kind of head; the weights of a head of another kind are dropped.

        Raises:
            UnknownModel: when a model without a vocabulary's head is to have one.
        """
        if head == self.head:
            return self
        if head == "vocabulary":
            raise UnknownModel("a model with a value head has no logits: give a language model's checkpoint")
        return self.model_copy(update={"head": head, "tied": False})

    @property
    def head_rows(self) -> int:
        """Rows of the head's own weight; a tied head has none."""
        return 1 if self.head == "value" else 0 if self.tied else self.vocabulary

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The linear layers of a block that can have LoRA adapters: experts and routers cannot."""
        attention: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
        if self.moe:
            return attention
        return (*attention, "gate_proj", "up_proj", "down_proj") if self.gated else (*attention, "up_proj", "down_proj")

    @property
    def adapted(self) -> tuple[Projection, ...]:
        """The linear layers of a block that have LoRA adapters."""
        if self.lora is None:
            return ()
        return self.projections if self.lora.targets == "all" else self.lora.targets

    @property
    def without_adapters(self) -> "ModelConfig":
        """The configuration without LoRA, for a model whose adapters are merged or dropped."""
        return self.model_copy(update={"lora": None})

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a layout must divide, as keyword arguments of `check_divides`."""
        moe = self.moe
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "intermediate": moe.intermediate if moe else self.intermediate,
            "layers": self.layers,
            "experts": moe.experts if moe else 0,
            "shared_intermediate": moe.shared_intermediate if moe else 0,
        }

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head is counted once, adapters are not counted."""
        norm = self.width * (2 if self.norm == "layer" else 1)
        block = sum(
            (
                2 * self.width * self.head_dim * (self.heads + self.kv_heads),
                self.moe.parameters(self.width)
                if self.moe
                else (3 if self.gated else 2) * self.width * self.intermediate,
                (4 if self.norm_at == "around" else 2) * norm,
                {None: 0, "head": 2, "width": self.heads + self.kv_heads}[self.qk_norm] * self.head_dim,
                ("qkv" in self.biases) * self.head_dim * (self.heads + 2 * self.kv_heads),
                ("out" in self.biases) * self.width,
                ("mlp" in self.biases) * (self.intermediate * (2 if self.gated else 1) + self.width),
            )
        )
        embeddings = (self.vocabulary + self.head_rows) * self.width
        positions = self.context * self.width if self.rope is None else 0
        return self.layers * block + embeddings + positions + norm


def check_layout(layout: Layout, model: ModelConfig) -> None:
    """Raise unless a layout divides the sizes of a model.

    Raises:
        LayoutError: names the degree that was given and the degrees that would work.
    """
    check_divides(layout, **model.sizes)


def check_numerics(numerics: Numerics, layout: Layout, model: ModelConfig) -> None:
    """Raise if a layout has no batch-invariant numerics: ring attention sums in no fixed order.

    Raises:
        LayoutError: says what to change.
    """
    if numerics == "exact" and layout.context > 1 and not splits_heads(layout, model.kv_heads):
        raise LayoutError(
            f"context={layout.context} by a ring merges attention in the order in which keys arrive, and "
            "numerics='exact' needs one order: set context=1, or context_by='heads' where the key-value heads divide"
        )


def describe(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The entries of a checkpoint's manifest that describe model and layout."""
    return {"model": model.model_dump(), "layout": layout.model_dump()}
