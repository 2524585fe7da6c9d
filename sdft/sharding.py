"""A model in parts over the ranks (FSDP2): weights, gradients, optimizer and averages.

The layers are put together one after the other, as they are used. The output head lies apart, for
the loss uses its weight without its module.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdft.model import LanguageModel, output_head
from sdft.ranks import Ranks, whole
from sdft.teacher import Teacher


def shard(
    lm: LanguageModel, teacher: Teacher | None, device: torch.device, ranks: Ranks
) -> Teacher | None:
    """Leave of student and teacher this rank's part, on the device; both must be whole.

    Returns the teacher with the parts of its averages.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    places = _places_of_averages(teacher) if teacher else {}
    for model in {lm.model, teacher.model if teacher else lm.model}:
        _shard_model(model, lm.compute, mesh)
    if teacher is None:
        return None
    now = dict(teacher.model.named_parameters())
    return replace(teacher, averages={name: now[place] for name, place in places.items()})


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(one, FSDPModule) for one in model.modules())


@contextmanager
def gathered(model: PreTrainedModel) -> Generator[None]:
    """Inside, every rank has the whole model, in the compute dtype, and runs it by itself.

    For sampling: to put each layer together for each token would take far longer. Nothing is to be
    done for a model that is not sharded. All ranks must enter and leave together.
    """
    groups = [one for one in model.modules() if isinstance(one, FSDPModule)]
    if not groups:
        yield
        return
    head = output_head(model)
    parts = dict(head.named_parameters())
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    dtype = _embedding(model).weight.dtype
    for name, part in parts.items():
        head.register_parameter(name, nn.Parameter(whole(part.detach()).to(dtype), False))
    try:
        yield
    finally:
        for name, part in parts.items():
            head.register_parameter(name, part)
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(True, recurse=False)


def gather(parts: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The whole tensors, in main memory, on the leading rank; nothing on the others."""
    tensors = {}
    for name, part in parts.items():  # one after the other, so that a GPU has room for them
        tensor = whole(part.detach())
        if ranks.leads:
            tensors[name] = tensor.cpu()
    return tensors


def fill(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give a whole model the weights that `gather` put together."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"{unknown} are not in the model that they were trained in"


def _places_of_averages(teacher: Teacher) -> dict[str, str]:
    """The name in the teacher's model of every average, by the student's."""
    names = {id(one): name for name, one in teacher.model.named_parameters()}
    return {name: names[id(average)] for name, average in teacher.averages.items()}


def _shard_model(model: PreTrainedModel, compute: torch.dtype, mesh: DeviceMesh) -> None:
    body, head = model.base_model, output_head(model)
    tied = _embedding(model).weight is head.weight
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = [one for one in body.modules() if isinstance(one, GradientCheckpointingLayer)]
    for module in [*layers, body]:
        group = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        group.set_gradient_divide_factor(1.0)  # the loss is a sum over the ranks, not a mean
        group.set_force_sum_reduction_for_comms(True)
    for name, one in list(head.named_parameters()):
        if tied and name == "weight":
            head.weight = _embedding(model).weight
        else:
            part = distribute_tensor(one.detach().to(mesh.device_type), mesh, [Shard(0)])
            head.register_parameter(name, nn.Parameter(part, one.requires_grad))


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Embedding), "no other kind is known"
    return module
