"""Dense parameters and what moves them: the same questions to torch's optimisers and to an engine's own.

State goes out and in by name, whole or as what one process holds of it: a parameter is ``model/NAME``, a moment of it
``optimizer/MOMENT/NAME``, float32 of the parameter's shape; ``step`` is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gr.processes import Axis
from gr.train.optimizers import counts_steps_in_groups, set_rate

Named = Iterable[tuple[str, nn.Parameter]]


class Dense:
    """Parameters that one of torch's optimisers moves: whole ones, or shards of them (DTensors over ``axis``)."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        make: Callable[[Named], torch.optim.Optimizer],
        axis: Axis | None = None,
    ) -> None:
        self.parameters, self.axis = parameters, axis
        self.optimizer = make(parameters.items())

    # -- a step ---------------------------------------------------------------------------------------------------

    def gradients(self) -> list[Tensor]:
        """What this process holds of them."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def norm(self) -> Tensor:
        """The norm of all gradients, of all processes together."""
        norm = torch.nn.utils.get_total_norm(self.gradients())
        return norm if self.axis is None else self.axis.add_up(norm.square()).sqrt()

    def clip(self, factor: Tensor, norm: Tensor) -> None:
        """Scale the gradients by ``factor``, which has brought the ``norm`` of everything down."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    def step(self, rate_factor: float) -> bool:
        """Move by the gradients and forget them; False if they were not numbers and nothing moved."""
        set_rate(self.optimizer.param_groups, rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def restart(self, name: str, rows_N: Tensor) -> None:
        """Rows of parameter ``name`` have no moments, as if they had never moved; the steps are the parameter's and
        stay."""
        for moment in self.optimizer.state.get(self.parameters[name], {}).values():
            if isinstance(moment, Tensor) and moment.shape == self.parameters[name].shape:
                moment[rows_N.to(moment.device)] = 0

    def finite(self) -> Tensor:
        """Whether all that this process holds are numbers: a bool scalar."""
        return torch.stack([local(p).isfinite().all() for p in self.parameters.values()]).all()

    # -- state ----------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """The parameters by name: their own memory, to be filled."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments under the names of a checkpoint."""
        tensors = {f"model/{name}": value for name, value in self.values().items()}
        for name, parameter in self.parameters.items():
            state = dict(self.optimizer.state.get(parameter, {}))
            if state and counts_steps_in_groups(self.optimizer):
                state["step"] = torch.tensor(float(self._group_of(parameter)["step"]))
            for moment, value in state.items():
                if value is not None:
                    tensors[f"optimizer/{moment}/{name}"] = torch.as_tensor(value)
        return tensors

    def wanted(self, name: str) -> Tensor:
        """Room for a moment of parameter ``name``, to be filled by a checkpoint and given to :meth:`take`."""
        parameter = self.parameters[name]
        if isinstance(parameter, DTensor):
            return torch.zeros_like(parameter.detach())
        return torch.zeros_like(parameter, device="cpu")

    def take(self, moment: str, name: str, value: Tensor) -> None:
        """Go on with the moment of parameter ``name`` that a checkpoint has."""
        parameter = self.parameters[name]
        group = self._group_of(parameter)
        if moment == "step" and counts_steps_in_groups(self.optimizer):
            group["step"] = int(value)
            return
        # torch counts steps on the CPU, but where one kernel does the whole update
        on_device = moment != "step" or group.get("fused") or group.get("capturable")
        self.optimizer.state[parameter][moment] = value.to(parameter.device) if on_device else value

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of an ordinary one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
