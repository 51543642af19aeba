"""Dense parameters that DeepSpeed's ZeRO shares among processes, with the questions of gr.train.engines.dense.

DeepSpeed takes a module as it is and is started at the first step, so that a checkpoint has filled the plain parameters
before: it copies them, and doesn't look at them again.  Moments are made then too, before they are needed: left to
itself it links those of the first group of parameters alone, and the others could never be saved.

Shapes: W processes, n numbers of a parameter on each.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gr.errors import UserError
from gr.processes import Processes, with_group
from gr.train.engines.dense import Dense
from gr.train.optimizers import counts_steps_in_groups, set_rate
from gr.train.slices import Slices

BUCKET_NUMBERS = 1 << 26
"""Numbers that are exchanged at once: DeepSpeed makes buffers of that size, 256 MiB each, whatever the model's."""


ALIGNMENT = 1024  # an odd number is refused


class Zero(Dense):
    """stage: 1 (moments are shared out), 2 (gradients too), 3 (parameters too).  optimizer: the config's component.
    module: what DeepSpeed wraps; its parameters are ``parameters``.  clip_norm: of one norm over everything.
    whole_below: at stage 3, parameters of fewer numbers are kept whole."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: Any,
        processes: Processes,
        *,
        module: nn.Module,
        stage: int,
        clip_norm: float | None,
        whole_below: int,
    ) -> None:
        super().__init__(parameters, optimizer.dense, processes.world)
        self.module, self.stage = module, stage
        self.processes, self.world, self.device = processes, processes.world, processes.device
        self.clip_norm, self.whole_below = clip_norm, whole_below
        self.moments: tuple[str, ...] = optimizer.moments
        self.counts: bool = optimizer.counts_steps
        self.steps = 0
        self.deepspeed = import_deepspeed(processes.device)
        self.engine: Any = None
        self._taken: dict[tuple[str, str], Tensor] = {}

    def started(self) -> Any:
        """DeepSpeed's engine; every process calls this together the first time."""
        if self.engine is None:
            with_group(self.device)
            _forget_groups_of_earlier_runs()
            numbers = sum(p.numel() for p in self.parameters.values())
            bucket = min(BUCKET_NUMBERS, numbers + -numbers % ALIGNMENT)
            # it reads a launcher's variable at every step, which one process has not, nor those of every launcher
            os.environ.setdefault("LOCAL_RANK", str(self.processes.local.rank))
            if self.device.type == "cpu":  # else it starts numactl, at every exchange, to count devices
                os.environ.setdefault("LOCAL_SIZE", str(self.processes.local.size))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.engine, *_ = self.deepspeed.initialize(
                    model=self.module,
                    optimizer=self.optimizer,
                    dist_init_required=False,
                    config={
                        # how many samples a step has is not its business: a step ends when it is told so
                        "train_micro_batch_size_per_gpu": 1,
                        "gradient_accumulation_steps": 1,
                        "gradient_clipping": self.clip_norm or 0.0,
                        "zero_optimization": {
                            "stage": self.stage,
                            "reduce_bucket_size": bucket,
                            "allgather_bucket_size": bucket,
                            "stage3_param_persistence_threshold": self.whole_below,
                        },
                        "zero_allow_untested_optimizer": True,
                        "zero_force_ds_cpu_optimizer": False,
                    },
                )
            self._own_norm = self._norm_function()
            self._scale_gradients()
            self._make_moments()
        return self.engine

    # -- a step ---------------------------------------------------------------------------------------------------

    def _scale_gradients(self) -> None:
        """The one place where a number of processes stands in a gradient.  DeepSpeed takes the *mean* over processes,
        and gradients here are sums: each process's own are multiplied by W, which is exact where W is a power of two
        (else one rounding).  Tables, which it doesn't see, are not scaled."""
        world = float(self.world.size)
        if world > 1:
            for parameter in self.parameters.values():
                parameter.register_hook(lambda gradient: gradient * world)

    def _forget_padding(self) -> None:
        """Zeros behind the gradients of this process's share.  At stage 3 the last processes' shares of a parameter
        that doesn't divide evenly are longer than what there is of it, and DeepSpeed leaves memory there as it was
        found: it would count in norms, and what is no number would stop a run."""
        if self.stage < 3:
            return
        optimizer = self.engine.optimizer
        for number, gradients in optimizer.averaged_gradients.items():
            for gradient, parameter in zip(gradients or [], optimizer.fp16_groups[number], strict=True):
                gradient.view(-1)[self._held_of(parameter, gradient.numel()) :].zero_()

    def _held_of(self, parameter: Any, share: int) -> int:
        """How many numbers of a parameter this process has in its ``share`` numbers."""
        return min(max(parameter.ds_numel - self.world.rank * share, 0), share)

    def norm(self) -> Tensor:
        self._forget_padding()
        found = self._own_norm()
        norms = torch.stack([torch.as_tensor(norm) for norm in (found if self.stage == 3 else [found])])
        # a norm below zero is DeepSpeed's word for one that is not a number
        return torch.linalg.vector_norm(torch.where(norms < 0, torch.inf, norms))

    def clip(self, factor: Tensor, norm: Tensor) -> None:
        """DeepSpeed clips by the norm that it is told, which is everything's and not its own."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            optimizer._get_norm_groups = lambda: [norm]
        else:
            optimizer.scaled_global_norm = lambda norm_type=2: norm

    def _norm_function(self) -> Any:
        optimizer = self.engine.optimizer
        return optimizer._get_norm_groups if self.stage == 3 else optimizer.scaled_global_norm

    def step(self, rate_factor: float) -> bool:
        self._forget_padding()
        set_rate(self.optimizer.param_groups, rate_factor)
        self.engine.step()  # forgets the gradients too
        moved = bool(self.engine.was_step_applied())
        self.steps += moved
        return moved

    def finite(self) -> Tensor:
        if self.engine is None or self.stage < 3:
            return super().finite()
        from deepspeed.utils import safe_get_local_fp32_param

        shares = [(p, safe_get_local_fp32_param(p).view(-1)) for p in self.parameters.values()]
        held = [share[: self._held_of(parameter, share.numel())] for parameter, share in shares]
        return torch.stack([part.isfinite().all() for part in held]).all()

    # -- state ----------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        if self.engine is not None:
            raise RuntimeError("DeepSpeed has started and has copies of its own: load before the first step")
        return super().values()

    def tensors(self) -> dict[str, Tensor]:
        """Each process its share of the rows of everything; one parameter at a time is whole for a moment."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self.started()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            whole = safe_get_full_fp32_param(parameter) if self.stage == 3 else parameter.detach()
            tensors[f"model/{name}"] = self._share(whole)
            for moment in self.moments:
                whole = safe_get_full_optimizer_state(parameter, moment)
                tensors[f"optimizer/{moment}/{name}"] = self._share(whole)
            if self.counts:
                tensors[f"optimizer/step/{name}"] = torch.tensor(float(self.steps))
        return tensors

    def _share(self, whole: Tensor) -> Tensor:
        rows = self.world.own(len(whole))
        return Slices.of_rows(whole.shape, rows, whole[rows.start : rows.stop].to("cpu", copy=True))

    def wanted(self, name: str) -> Tensor:
        """Room for this process's share."""
        shape = self.parameters[name].shape
        rows = self.world.own(shape[0])
        return Slices.of_rows(shape, rows, torch.zeros(len(rows), *shape[1:]))

    def take(self, moment: str, name: str, value: Tensor) -> None:
        self._taken[moment, name] = value

    def _make_moments(self) -> None:
        taken, self._taken = self._taken, {}
        counted = {int(value) for (moment, _), value in taken.items() if moment == "step"}
        if len(counted) > 1:
            raise UserError(
                f"the checkpoint counts other steps for other parameters ({sorted(counted)}), and DeepSpeed counts "
                "one for all: go on with train.engine=fsdp",
                everywhere=True,
            )
        self.steps = counted.pop() if counted else 0
        zero = self.engine.optimizer
        groups = self.optimizer.param_groups
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else [g["params"][0] for g in groups]
        for flat in flats if self.moments or self.counts else []:
            state = {moment: torch.zeros_like(flat) for moment in self.moments}
            if self.counts and not counts_steps_in_groups(self.optimizer):
                # where one kernel does the whole update, the count lies beside the parameters
                on = flat.device if groups[0].get("fused") or groups[0].get("capturable") else "cpu"
                state["step"] = torch.tensor(float(self.steps), device=on)
            self.optimizer.state[flat] = state
        if counts_steps_in_groups(self.optimizer):
            for group in groups:
                group["step"] = self.steps
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for moment in self.moments:
            for name, parameter in self.parameters.items():
                if (moment, name) in taken:
                    share = taken[moment, name]
                    assert isinstance(share, Slices)
                    self._set(parameter, moment, self.world.gather(share.rows().to(self.device)))

    def _set(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # not the full one: it breaks where a parameter doesn't divide evenly
        n = safe_get_local_optimizer_state(parameter, moment).numel()
        padded = F.pad(whole.flatten(), (0, n * self.world.size - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded.chunk(self.world.size)[self.world.rank], moment)


def _forget_groups_of_earlier_runs() -> None:
    """DeepSpeed keeps a copy of the group of all processes for good, and a run's group goes with the run."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is not None:
        try:
            dist.get_process_group_ranks(groups._WORLD_GROUP)
        except (KeyError, ValueError):
            groups._WORLD_GROUP = None


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, for this kind of device; a UserError where it isn't there."""
    os.environ["DS_ACCELERATOR"] = device.type  # else it looks around, and says what it finds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"train.engine is deepspeed, and it can't be imported ({error}): make setup-sharded installs it, "
            "or use train.engine=fsdp",
            everywhere=True,
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # names of collectives that it calls and nobody else can change
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # else it compiles a C++ operator when it is started on a CPU, and fails where there is no compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
