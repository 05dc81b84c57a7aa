"""What an optimiser remembers, whole and by parameter, however its parts are spread over processes.

One form for one process, DDP, DeepSpeed ZeRO and FSDP, so that a run may be stopped under one of them and
go on under another, with another number of processes. Through the libraries' calls for single parameters:
their own checkpoint folders are pickles, one file per process, for that number of processes only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrec import launched

States = dict[int, dict[str, Any]]
"""By number of the parameter: tensors of its shape, and scalars such as Adam's step."""


def read_states(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> States:
    """The optimiser's states, whole and on the CPU, in the main process; others get none.

    Every process must call. A GPU holds the whole states of one parameter at a time.
    """
    found: States = {}
    for number, parameter in enumerate(parameters):
        if is_zero(parameter):
            state = _read_zero(parameter, optimizer)
        else:
            state = {name: whole(value) for name, value in optimizer.state[parameter].items()}
        if launched.is_main():
            found[number] = {
                name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()
            }
    return found


def write_states(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, states: States
) -> None:
    """Inverse of `read_states`; every process must call with the same states."""
    if any(is_zero(parameter) for parameter in parameters):
        _begin_zero(parameters, optimizer, states)
        for number, parameter in enumerate(parameters):
            _write_zero(parameter, optimizer, states[number])
        return
    ready = {
        number: {name: like(value, parameters[number]) for name, value in state.items()}
        for number, state in states.items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": ready, "param_groups": groups})


def whole(value: Any) -> Any:
    """A tensor with all its parts, if they lie in different processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor spread as FSDP spread the parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not has_shape(value):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def has_shape(value: Any) -> bool:
    """Whether a state is a number for every weight, not one for all."""
    return isinstance(value, Tensor) and value.dim() > 0


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO trains this parameter."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def write_master(parameter: Any, value: Tensor) -> None:
    """Put a whole weight into the copy that ZeRO updates; nothing to do without ZeRO."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, own_part(parameter, value))
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


def own_part(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of a whole tensor, as ZeRO-3 cuts it: flat, equal parts, zeros at the end."""
    size = parameter.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, size * launched.world_size() - value.numel()))
    return padded.narrow(0, size * launched.rank(), size)


def flat_states(parameters: list[Any], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The flat tensors that stand in the optimiser for this process's parts of all parameters."""
    if hasattr(parameters[0], "ds_id"):
        return list(parameters[0]._z3_optimizer.fp32_partitioned_groups_flat)
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def _read_zero(parameter: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_optimizer_state

    state = next(state for state in optimizer.state.values() if state)
    return {
        name: safe_get_full_optimizer_state(parameter, name) if has_shape(value) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _begin_zero(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, states: States
) -> None:
    """Give the optimiser states to write into, as its first step would."""
    names = next(state for state in states.values() if state)
    for flat in flat_states(parameters, optimizer):
        for name, value in names.items():
            begun = torch.zeros_like(flat) if has_shape(value) else value.to(flat.device, copy=True)
            optimizer.state[flat][name] = begun


def _write_zero(parameter: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_optimizer_state

        for name, value in state.items():
            if has_shape(value):
                safe_set_local_optimizer_state(parameter, own_part(parameter, value), name)
        return
    place = parameter._hp_mapping
    if place is None:  # no part of it is in this process
        return
    flat = optimizer.param_groups[place.param_group_index]["params"][0]
    to, of = place.hp_fragment_address, place.lp_fragment_address
    for name, value in state.items():
        if has_shape(value):
            part = value.flatten().narrow(0, of.start, of.numel)
            optimizer.state[flat][name].narrow(0, to.start, to.numel).copy_(part)
