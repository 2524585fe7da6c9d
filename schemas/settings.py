"""Every knob of training, evaluation and the gate, as frozen trees with checked ranges."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.base import Contract
from schemas.templates import TEMPLATES, check_template

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class LoraSettings(Contract):
    """Low-rank adapters in place of the full weights (Hu et al., 2106.09685)."""

    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Annotated[int, Field(ge=1)] = 64
    """An adapter adds alpha / rank times its product to the weights."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear`: all but the output head."""


class TrainingSettings(Contract):
    """What changes the weights that come out of a stage: all of it is part of the stage key."""

    method: Literal["sdft", "sft"] = "sdft"
    """`sft`: cross-entropy on the demonstrations, through the same loop, as the baseline."""

    epochs: Annotated[int, Field(ge=1)] = 2
    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    skip_first_tokens: Annotated[int, Field(ge=0)] = 0
    """Completion tokens left out of the loss (the paper's launch script leaves out 3)."""

    teacher: Literal["frozen", "ema"] = "frozen"
    ema_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    teacher_template: str = "compact"
    """Name of a shipped template, or a text of your own with {prompt} and {demonstration}."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Limit for the student's and the teacher's prompt; default: all that the model can hold."""

    lora: Annotated[LoraSettings | None, Field(exclude_if=lambda lora: lora is None)] = None
    """Train adapters only; default: all weights. Left out where there is none, so that stages of
    before keep their keys."""

    @model_validator(mode="after")
    def _something_is_left_to_learn(self) -> Self:
        if self.skip_first_tokens >= self.max_new_tokens:
            raise ValueError(
                f"skip_first_tokens {self.skip_first_tokens} leaves nothing of max_new_tokens "
                f"{self.max_new_tokens}; lower it"
            )
        return self

    @field_validator("teacher_template")
    @classmethod
    def _template_is_usable(cls, value: str) -> str:
        if value not in TEMPLATES:
            check_template(value)
        return value


class RuntimeSettings(Contract):
    """What changes how a stage is run, but not (beyond rounding) what comes out of it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrix products are made in; auto: bf16 on a GPU. Weights that learn stay in fp32."""
    processes: Annotated[int, Field(ge=1)] = 1
    """How many train a stage together on one machine, on a GPU each where there are any."""
    sharding: Literal["none", "full"] = "none"
    """Whether each of several processes has the whole model, or a part of weights, gradients,
    optimizer and averages (FSDP2)."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass, to save memory; default: on a GPU."""
    gpu_memory_gib: Annotated[float, Field(gt=0.0)] | None = None
    """What each GPU must have free before a stage begins on it; default: whatever it has."""
    compile: bool = False
    """Have torch.compile make the scoring passes; on a CPU it gains nothing (docs/decisions.md)."""
    offload_teacher: bool = False
    """Keep the teacher's copy of a fully trained model in main memory between its turns."""
    sampler: Literal["student", "vllm"] = "student"
    """Who samples rollouts; vllm: an engine on the same GPU, where vLLM is installed."""
    vllm_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """The share of the GPU's memory that is vLLM's."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens a forward and backward pass; default: by the device, less where memory runs out."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Exactly so often, whatever it costs."""
    checkpoint_every_s: Annotated[float, Field(gt=0.0)] = 300.0
    """And when so much time has passed; later where saving would take over 5% of the time."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    rollouts_a_step: Annotated[int, Field(ge=0)] = 2
    """Rollouts kept a step for people to read."""
    health: Literal["stop", "warn"] = "stop"
    """What becomes of a stage whose curve shows that more steps would be a waste."""
    stall_timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """A trainer or evaluator that reports nothing for this long is ended."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.processes > 1 and self.sampler == "vllm":
            raise ValueError("sampler vllm goes with one process only; use student")
        if self.sharding == "full" and (self.compile or self.offload_teacher):
            name = "compile" if self.compile else "offload_teacher"
            raise ValueError(f"sharding full does not go with {name}; leave one of them out")
        return self


class EvaluationSettings(Contract):
    """How suites are answered: greedy, so that the same model gives the same score."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 64
    forward_transfer: bool = True
    """Also score every stage on the skills that are still to come."""


class GateSettings(Contract):
    """What turns a row of the retention matrix into a verdict; limits are in score (0 to 1)."""

    min_gain: Fraction = 0.05
    """What a new skill must gain. Above 0 the gain must also be real: with `confidence` no work of
    chance. With 0 it need not be: a skill that gained nothing passes, one that got worse does not.
    """
    max_forgetting: Fraction = 0.05
    """What an earlier skill or a general suite may lose against its reference."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """One-sided, of the tests and of the bounds; it holds for each suite by itself."""
    band: Fraction = 0.0
    """A number nearer to its limit than this is left to a person."""
    proof: Literal["estimate", "bound"] = "estimate"
    """What is held against the limit: the measured change, or the lower confidence bound of it."""
