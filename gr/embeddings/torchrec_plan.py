"""Where TorchRec's planner puts the rows of a table, and the module that exchanges them.

Shapes: I rows, W width as stored.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist

from gr.embeddings.table import TableSpec
from gr.errors import UserError, nearest
from gr.processes import Processes

SHARDINGS = ("auto", "table_wise", "row_wise", "column_wise", "data_parallel")
IMPOSSIBLE = {
    "table_row_wise": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "table_column_wise": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "grid_shard": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
    "grid": "TorchRec has it for pooled tables only, and a sequence needs each of its rows",
}
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
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    from torchrec.distributed.comm_ops import set_gradient_division

    set_gradient_division(False)  # owners get the sum of gradients, as everything here does
    return torchrec


def shard(spec: TableSpec, width: int, sharding: str, processes: Processes) -> tuple[Any, str]:
    """(the sharded module, its plan for people).  Its memory is this process's shards; nothing of the table's size is
    ever made elsewhere.  Needs a process group, with one process too."""
    import_torchrec()
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    name = f"table_{spec.name}"  # not "items", which a ModuleDict has already
    config = EmbeddingConfig(
        name=name, num_embeddings=spec.rows, embedding_dim=width, feature_names=[FEATURE]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        sharder = EmbeddingCollectionSharder()
        plan = _plan(collection, name, spec, width, sharding, sharder, processes)
        # on a CPU the kernel only holds the memory: look-ups and updates are ours
        plan[name].compute_kernel = "dense"
        module = sharder.shard(
            collection, plan, ShardingEnv.from_process_group(dist.group.WORLD), processes.device
        )
    return module, _words(plan[name], spec, width)


def _plan(
    collection: Any, name: str, spec: TableSpec, width: int, sharding: str, sharder: Any, processes: Processes
) -> Any:
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.types import PlannerError
    from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan

    world = processes.world
    if sharding == "column_wise":
        return construct_module_sharding_plan(
            collection,
            {name: column_wise(ranks=list(range(world.size)), compute_kernel="dense")},
            sharder=sharder,
            local_size=processes.local.size,
            world_size=world.size,
            device_type=processes.device.type,
        )
    types = ["row_wise", "table_wise"] if sharding == "auto" else [sharding]
    constraints = {
        name: ParameterConstraints(sharding_types=types, compute_kernels=["fused"], pooling_factors=[POOLING])
    }
    topology = Topology(
        world_size=world.size,
        local_world_size=processes.local.size,
        compute_device=processes.device.type,
        ddr_cap=host_memory() // max(processes.local.size, 1),
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, batch_size=1)
    holder = torch.nn.Module()
    holder.table = collection  # the planner looks for tables inside of a module
    try:
        _count_moments(collection, spec.moments)
        if world.size > 1:
            plan = planner.collective_plan(holder, [sharder], dist.group.WORLD)
        else:
            plan = planner.plan(holder, [sharder])
    except PlannerError as error:
        needed = spec.rows * width * 4 * (1 + spec.moments) / 2**30
        raise UserError(
            f"no plan puts table '{spec.name}' ({spec.rows:,} rows x {width}, {needed:.1f} GiB with its moments) on "
            f"{world.size} processes with {host_memory() / 2**30:.1f} GiB a machine ({str(error).splitlines()[0]}): "
            "start more processes, lower model.dim, or use optimizer=rowwise_adagrad",
            everywhere=True,
        ) from None
    return plan.get_plan_for_module("table")


def _count_moments(collection: Any, moments: int) -> None:
    """The planner reads from a parameter which optimiser's state lies beside it."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    kinds = {1: torch.optim.Adagrad, 2: torch.optim.Adam}
    if moments in kinds:
        _apply_optimizer_in_backward(kinds[moments], collection.parameters(), {"lr": 0.0})


def _words(sharding: Any, spec: TableSpec, width: int) -> str:
    """One line: how the table is cut, and what each rank holds."""
    shards = sharding.sharding_spec.shards
    held = ", ".join(
        f"rank {shard.placement.rank()}: rows {shard.shard_offsets[0]:,}+{shard.shard_sizes[0]:,}"
        + (
            f" columns {shard.shard_offsets[1]}+{shard.shard_sizes[1]}"
            if shard.shard_sizes[1] < width
            else ""
        )
        for shard in shards[:8]
    )
    more = f" and {len(shards) - 8} more" if len(shards) > 8 else ""
    kind = str(getattr(sharding.sharding_type, "value", sharding.sharding_type))
    return f"table '{spec.name}', {spec.rows:,} rows x {spec.dim}: {kind} ({held}{more})"


def host_memory() -> int:
    """Bytes of this machine's memory."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
