"""Low-rank adapters (2106.09685) through peft, in place of training all weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from schemas.base import BadInput
from schemas.settings import LoraSettings
from sdft.pretrained import open_weights

STUDENT, TEACHER = "default", "teacher"
"""Names of the adapters in the model; peft saves the one named `default` as the adapter."""


def add_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze a model's weights and give its linear layers an adapter that changes nothing yet.

    The layers are changed in place; what is returned is peft's handle on them. Raises BadInput for
    targets that are not there or that an adapter cannot be given.
    """
    _check_targets(model, settings)
    torch.manual_seed(seed)
    return get_peft_model(model, _config(settings), STUDENT)


def add_average(student: PeftModel) -> dict[str, nn.Parameter]:
    """A second adapter, equal to the student's; its parameters by the names of the student's.

    It starts at the student's A: averaging both factors from zero would move their product only
    by the square of what it should.
    """
    inner = student.get_base_model()
    student.add_adapter(TEACHER, student.peft_config[STUDENT])
    parameters = dict(inner.named_parameters())
    averages = {
        name: parameters[_named(name, TEACHER)]
        for name in parameters
        if f".{STUDENT}." in name and _named(name, TEACHER) in parameters
    }
    for name, average in averages.items():
        average.data.copy_(parameters[name])
    student.set_adapter(STUDENT)
    for average in averages.values():
        average.requires_grad_(False)
    return averages


@torch.no_grad()
def merged_weight(layer: LoraLinear) -> Tensor:
    """A linear layer's weight with the student's adapter added to it."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear | Conv1D), "no other layer is given an adapter"
    return base.weight + layer.get_delta_weight(STUDENT)


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight by the name that it has without adapters, the student's added to it."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLinear)}
    for name, weight in model.named_parameters():
        owner, _, field = name.rpartition(".base_layer.")
        if owner:
            yield f"{owner}.{field}", merged_weight(layers[owner]) if field == "weight" else weight
        elif not any(f".{adapter}." in name for adapter in (STUDENT, TEACHER)):
            yield name, weight


def save_adapter(student: PeftModel, parent_hash: str, directory: Path) -> None:
    """Write the student's adapter as peft does; it names its parent by hash, not by a path here."""
    _settle(student, parent_hash)
    # Whether to save embeddings it would else ask the hub, where no model has that hash for a name.
    student.save_pretrained(
        str(directory), selected_adapters=[STUDENT], save_embedding_layers=False
    )
    (directory / "README.md").unlink(missing_ok=True)  # an empty form


def merged(parent_dir: Path, *adapter_dirs: Path) -> PreTrainedModel:
    """The parent with adapters added to its weights, one after the other, in fp32 on the CPU.

    Always the same, to the bit.
    """
    model = open_weights(parent_dir, torch.float32)
    for directory in adapter_dirs:
        model = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    return model


def stacked(base_dir: Path, adapter_dirs: Sequence[Path]) -> PeftModel:
    """A model with the adapters of several stages, each learned on the one before, as one adapter.

    Its rank is the sum of theirs; it adds the sum of their products, which is what merging them one
    after the other adds, up to rounding.
    """
    base = open_weights(base_dir, "auto")
    names = [f"stage-{number}" for number in range(len(adapter_dirs))]
    stack = PeftModel.from_pretrained(base, str(adapter_dirs[0]), names[0])
    for name, directory in zip(names[1:], adapter_dirs[1:], strict=True):
        stack.load_adapter(str(directory), name)
    adapters = stack.base_model
    assert isinstance(adapters, LoraModel), "they are saved by `save_adapter`"
    adapters.add_weighted_adapter(names, [1.0] * len(names), STUDENT, combination_type="cat")
    stack.set_adapter(STUDENT)
    for name in names:
        stack.delete_adapter(name)
    _settle(stack, str(base_dir))
    return stack


def _settle(model: PeftModel, base: str) -> None:
    """Name what the adapter is for, and list its layers in one order: the same bytes each time."""
    config = model.peft_config[STUDENT]
    assert isinstance(config, LoraConfig), "no other adapters are made here"
    config.base_model_name_or_path = base
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)


def _check_targets(model: PreTrainedModel, settings: LoraSettings) -> None:
    modules = dict(model.named_modules())
    linear = {name for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D)}
    linear -= {name for name in linear if modules[name] is model.get_output_embeddings()}
    known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    for target in settings.targets if settings.targets != "all-linear" else ():
        named = {name for name in modules if f".{name}".endswith(f".{target}")}
        if not named:
            raise BadInput(
                f"training.lora.targets: {model.name_or_path} has no module {target!r}; its linear "
                f"layers are {known}"
            )
        if not named <= linear:
            raise BadInput(
                f"training.lora.targets: {min(named - linear)!r} is no linear layer below the "
                f"output head; those are {known}"
            )


def _config(settings: LoraSettings) -> LoraConfig:
    named = settings.targets
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=named if isinstance(named, str) else list(named),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _named(name: str, adapter: str) -> str:
    return name.replace(f".{STUDENT}.", f".{adapter}.")
