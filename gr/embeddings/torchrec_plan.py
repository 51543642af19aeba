"""Where TorchRec's planner puts the rows of a table, and the module that exchanges them.

Shapes: I rows, W width as stored.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from gr.embeddings.row_updates import Twin
from gr.embeddings.table import TableSpec
from gr.embeddings.topology import GIB, KEPT_BACK, Cluster, cluster
from gr.errors import UserError, nearest
from gr.processes import Processes, with_group

SHARDINGS = ("auto", "table_wise", "row_wise", "column_wise", "data_parallel")
IMPOSSIBLE = {
    "table_row_wise": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "table_column_wise": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "grid_shard": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "grid": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
}
KERNELS = {"device": "fused", "host": "fused_uvm", "cached": "fused_uvm_caching"}
"""The names under which TorchRec has the places of a table's memory."""
FEATURE = "rows"
POOLING = 1000.0
"""Ids a sample that the planner counts with; without a number it thinks of one."""


def check_sharding(sharding: str) -> str:
    """``sharding``, if a sequence table can have it; ValueError says why not."""
    if sharding in IMPOSSIBLE:
        raise ValueError(f"{IMPOSSIBLE[sharding]}: use {', '.join(SHARDINGS)}")
    if sharding not in SHARDINGS:
        raise ValueError(f"no such sharding, {nearest(sharding, SHARDINGS)}")
    return sharding


def import_torchrec() -> Any:
    """The package, quiet; a UserError where it isn't there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchrec
            import torchrec.distributed
    except ImportError as error:
        raise UserError(
            f"model.table is torchrec, and it can't be imported ({error}): make setup-sharded installs it",
            everywhere=True,
        ) from None
    for name in ("torchrec", "torch.fx._symbolic_trace"):  # the latter speaks of how TorchRec calls it
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchrec.distributed.comm_ops import set_gradient_division

    set_gradient_division(False)  # owners get the sum of gradients, as everything here does
    return torchrec


class NoRoom(UserError):
    """No plan puts a table into the memory that there is."""


# -- a plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a table's config asks of a plan.  sharding: one of :data:`SHARDINGS`.  placement: device, host, cached."""

    sharding: str = "auto"
    placement: str = "device"


@dataclass(frozen=True)
class Held:
    """A part of a table, on ``rank``: rows row0 ..., columns col0 ... of the W as stored."""

    rank: int
    row0: int
    rows: int
    col0: int
    columns: int


@dataclass(frozen=True)
class TablePlan:
    """How a table is cut.  sharding: as it was found (row_wise, ...).  width: W."""

    spec: TableSpec
    wanted: Wanted
    sharding: str
    width: int
    held: tuple[Held, ...]

    def bytes_of(self, part: Held) -> tuple[int, int]:
        """Of a part's rows, and of the moments beside them."""
        return 4 * part.rows * part.columns, 4 * part.rows * _moments_of_a_row(self.spec, part.columns)


def plan(spec: TableSpec, width: int, wanted: Wanted, on: Cluster) -> tuple[Any, TablePlan]:
    """TorchRec's plan of the one table, and what it says.  Needs no process group and no GPU, whatever ``on`` has.

    Raises NoRoom where the table doesn't fit, with the nearest changes that would make it fit.
    """
    found = _plan(spec, width, wanted, on)
    if found is None:
        raise NoRoom(_no_room(spec, width, wanted, on), everywhere=True)
    return found


def shard(
    spec: TableSpec,
    width: int,
    wanted: Wanted,
    processes: Processes,
    topology: str,
    communication: str,
    twin: Twin | None,
) -> tuple[Any, TablePlan]:
    """(the sharded module, its plan).  Its memory is this process's shards; nothing of the table's size is ever made
    elsewhere.  Needs a process group, with one process too.

    communication: fp32, or what rows are rounded to while they travel, their gradients then to bfloat16.  twin: of
    FBGEMM, the optimiser that moves the rows; None: the module only holds and exchanges them."""
    import_torchrec()
    from torchrec.distributed.types import ShardingEnv

    with_group(processes.device)
    on = cluster(topology, processes)
    # the first process plans: all must have the same, and a refusal comes from all
    found = _plan(spec, width, wanted, on) if processes.is_main else None
    placed = processes.broadcast(None if found is None else found[0])
    if placed is None:
        raise UserError(_no_room(spec, width, wanted, on), everywhere=True)
    parameter = placed[_name(spec)]
    told = _told(parameter, spec, width, wanted)
    # our own look-ups and updates want nothing of the kernel but its memory
    own = "dense" if wanted.placement == "device" else KERNELS[wanted.placement]
    parameter.compute_kernel = KERNELS[wanted.placement] if twin else own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _sharder(communication, twin).shard(
            _collection(spec, width),
            placed,
            ShardingEnv.from_process_group(dist.group.WORLD),
            processes.device,
        )
    return module, told


def _plan(spec: TableSpec, width: int, wanted: Wanted, on: Cluster) -> tuple[Any, TablePlan] | None:
    """None where the table doesn't fit."""
    import_torchrec()
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError
    from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan

    name, kernel = _name(spec), KERNELS[wanted.placement]
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        collection, sharder = _collection(spec, width), _sharder("fp32", None)
        if wanted.sharding == "column_wise":  # the planner has a mind of its own about narrow columns
            placed = construct_module_sharding_plan(
                collection,
                {name: column_wise(ranks=list(range(on.processes)), compute_kernel=kernel)},
                sharder=sharder,
                local_size=on.per_machine,
                world_size=on.processes,
                device_type=on.device,
            )
        else:
            types = ["row_wise", "table_wise"] if wanted.sharding == "auto" else [wanted.sharding]
            planner = EmbeddingShardingPlanner(
                topology=_topology(on),
                constraints={
                    name: ParameterConstraints(
                        sharding_types=types, compute_kernels=[kernel], pooling_factors=[POOLING]
                    )
                },
                storage_reservation=FixedPercentageStorageReservation(KEPT_BACK),
                batch_size=1,
            )
            _count_moments(collection, spec)
            holder = torch.nn.Module()
            holder.table = collection  # the planner looks for tables inside of a module
            try:
                placed = planner.plan(holder, [sharder]).get_plan_for_module("table")
            except PlannerError:
                return None
    told = _told(placed[name], spec, width, wanted)
    return (placed, told) if _fits(told, on) else None


def _collection(spec: TableSpec, width: int) -> Any:
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

    config = EmbeddingConfig(
        name=_name(spec), num_embeddings=spec.rows, embedding_dim=width, feature_names=[FEATURE]
    )
    return EmbeddingCollection(tables=[config], device=torch.device("meta"))


def _name(spec: TableSpec) -> str:
    return f"table_{spec.name}"  # not "items", which a ModuleDict has already


def _sharder(communication: str, twin: Twin | None) -> Any:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
    from torchrec.distributed.types import CommOp

    fused, codecs = None, None
    if twin is not None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType

        fused = {"optimizer": EmbOptimType[twin.name], "learning_rate": 0.0, **twin.arguments}
    if communication != "fp32":
        # gradients of mean losses are small: float16 would make zeros of those below 2^-25, so they go as bfloat16
        rounding = QCommsConfig(forward_precision=CommType(communication), backward_precision=CommType.BF16)
        # not get_qcomm_codecs_registry, which makes float16 of bfloat16 on a CPU and says so in a log
        codecs = {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(rounding)}
    return EmbeddingCollectionSharder(fused_params=fused, qcomm_codecs_registry=codecs)


def _topology(on: Cluster) -> Any:
    from torchrec.distributed.planner import Topology

    known = on.hardware
    return Topology(  # bandwidths are bytes a millisecond
        world_size=on.processes,
        local_world_size=on.per_machine,
        compute_device=on.device,
        hbm_cap=known.memory,
        ddr_cap=on.host_memory // on.per_machine,
        hbm_mem_bw=known.speed / 1000,
        hbm_to_ddr_mem_bw=known.host_link / 1000,
        intra_host_bw=known.link / 1000,
        inter_host_bw=known.network / 1000,
    )


def _count_moments(collection: Any, spec: TableSpec) -> None:
    """The planner reads from a parameter which optimiser's state lies beside it.  (A number for each, and one a row
    beside, it can't think of together: no optimiser here has both.)"""
    from torchrec.optim import RowWiseAdagrad

    moments, row_moments = spec.moments, spec.row_moments
    kinds: dict[int, Any] = {0: torch.optim.SGD, 1: torch.optim.Adagrad}
    kind = RowWiseAdagrad if row_moments and not moments else kinds.get(moments, torch.optim.Adam)
    for parameter in collection.parameters():
        # as torch.distributed.optim notes it, which takes a second to be imported
        parameter._optimizer_classes = [kind]


def _moments_of_a_row(spec: TableSpec, columns: int) -> int:
    """Numbers beside so many columns of a row: the weights and the bias have their own."""
    return spec.moments * columns + spec.row_moments * (1 + spec.bias)


def _told(sharding: Any, spec: TableSpec, width: int, wanted: Wanted) -> TablePlan:
    held = tuple(
        Held(shard.placement.rank(), shard.shard_offsets[0], shard.shard_sizes[0], shard.shard_offsets[1],
             shard.shard_sizes[1])
        for shard in sharding.sharding_spec.shards
    )  # fmt: skip
    kind = str(getattr(sharding.sharding_type, "value", sharding.sharding_type))
    return TablePlan(spec, wanted, kind, width, held)


@contextmanager
def _quiet() -> Iterator[None]:
    """The planner prints what it thinks of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# -- room ----------------------------------------------------------------------------------------------------------


def _room(wanted: Wanted, on: Cluster) -> int:
    return on.room if wanted.placement == "device" else on.host_room


def _fits(told: TablePlan, on: Cluster) -> bool:
    held: dict[int, int] = {}
    for part in told.held:
        held[part.rank] = held.get(part.rank, 0) + sum(told.bytes_of(part))
    return max(held.values()) <= _room(told.wanted, on)


def _no_room(spec: TableSpec, width: int, wanted: Wanted, on: Cluster) -> str:
    """The refusal, with what would be enough."""
    total = 4 * spec.rows * (width + _moments_of_a_row(spec, width)) / GIB
    where = "of the device's" if wanted.placement == "device" and on.device != "cpu" else "of the machine's"
    many = f"{on.processes} process{'es' if on.processes > 1 else ''}"
    return (
        f"no plan puts table '{spec.name}' ({spec.rows:,} rows x {width}, {total:,.1f} GiB with its moments) "
        f"{wanted.sharding} on {many} with {_room(wanted, on) / GIB:,.1f} GiB for tables each ({where} memory): "
        f"it fits {', '.join(remedies(spec, width, wanted, on)) or 'nowhere as it is: make it smaller'}"
    )


def remedies(spec: TableSpec, width: int, wanted: Wanted, on: Cluster) -> list[str]:
    """What would make a table fit, each alone: the nearest number of processes, width, optimiser, place or sharding."""
    found = []
    if wanted.sharding not in ("auto", "row_wise"):
        by_rows, change = replace(wanted, sharding="row_wise"), "with model.table.sharding=row_wise"
        if _plan(spec, width, by_rows, on):
            return [change]
        first, *others = remedies(spec, width, by_rows, on) or [""]
        return [f"{change} {first}", *others] if first else []
    room = _room(wanted, on)
    if processes := _enough_processes(spec, width, wanted, on):
        per_machine = on.of(processes).per_machine
        found.append(
            f"on {processes} processes ({math.ceil(processes / per_machine)} machines of {per_machine})"
        )
    numbers = room // 4 // math.ceil(spec.rows / on.processes)  # of a row and its moments
    beside = width - spec.dim
    dim = (numbers - spec.row_moments * (1 + spec.bias)) // (1 + spec.moments) - beside
    if dim >= 8:
        found.append(f"with model.dim={dim - dim % 4}")
    for optimizer, moments, row_moments in (("rowwise_adagrad", 0, 1), ("sgd", 0, 0)):
        lighter = _moments_of_a_row(spec, width) > moments * width + row_moments * (1 + spec.bias)
        if lighter and width + row_moments * (1 + spec.bias) <= numbers:
            found.append(f"with optimizer={optimizer}")
            break
    if wanted.placement == "device" and on.device != "cpu":
        on_host = replace(wanted, placement="host")
        if _plan(spec, width, on_host, on):
            found.append("with model.table.placement=host")
    return found[:-1] + [f"or {found[-1]}"] if len(found) > 1 else found


def _enough_processes(spec: TableSpec, width: int, wanted: Wanted, on: Cluster) -> int | None:
    """The fewest by arithmetic; a few more where the planner, which counts what is exchanged too, still refuses."""
    room, row = _room(wanted, on), 4 * (width + _moments_of_a_row(spec, width))
    if room < row:
        return None
    processes = max(math.ceil(spec.rows / (room // row)), on.processes + 1)
    for _ in range(8):
        if _plan(spec, width, wanted, on.of(processes)):
            return processes
        processes += max(processes // 50, 1)
    return None
