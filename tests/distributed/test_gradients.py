"""A step has the scale of the global mean loss: on any number of processes, by any engine, for dense parameters and
rows of a table alike.  Plain gradient descent shows it; Adam divides every scale out.
"""

from __future__ import annotations

import math

import pytest
import torch

from gr.models.step import StepContext
from gr.processes import Processes, processes
from gr.registry import ENGINES, resolve
from gr.train.engines.engine import parameters
from gr.train.optimizers import SGD
from tests.distributed.group import in_group
from tests.packages import needs
from tests.precision import UNIT, growth
from tests.unit.models_common import batch, engine_of, fill, generator, retrieval, run_config, whole

needs("torchrec")

ITEMS, DIM, RATE, CLIP = 40, 8, 0.5, 0.25
TABLES = ("local", "mapped", "torchrec")
PLAIN = ("ddp", "all_reduce")  # those that share nothing out: test_engines.py compares the others with them
LENGTHS = (9, 7, 0, 1, 1, 5, 12, 2)  # of four processes, the second has no target
MICRO_BATCH = 9
OBJECTIVES = {"own": {"name": "sampled_softmax", "negatives": 7}, "in_batch": {"name": "in_batch"}}
CASES = [
    (table, engine, objective, clip)
    for table in TABLES
    for engine in PLAIN
    for objective in OBJECTIVES
    for clip in (None, CLIP)
]


def step_of(joined: Processes, table: str, engine: str, objective: str, clip: float | None) -> dict:
    """How far a step of SGD on the global batch moved each parameter, and the norm."""
    encoder = {"name": "hstu", "layers": 1, "heads": 1, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
    similarity = {"normalize": False, "temperature": 1.0, "item_bias": True}
    model_section = {"table": table, "similarity": similarity, "input": {"dropout": 0.0}, "table_std": 0.5}
    run = run_config(encoder, OBJECTIVES[objective], dim=DIM, length=12, model=model_section)
    model = retrieval(run, ITEMS, processes=joined)
    values = generator()
    for parameter in parameters(model).values():  # rows that processes share are filled alike by all
        fill(parameter, 0.3 * torch.randn(parameter.shape, generator=values))
    joined.barrier()
    kind = resolve(ENGINES, engine, "engine")
    stepping = engine_of(model, SGD(SGD.Config(lr=RATE)), clip, joined, kind)

    rank, ranks = joined.data.rank, joined.data.size
    every = batch(LENGTHS, ITEMS)
    share = every.slice(rank * len(LENGTHS) // ranks, (rank + 1) * len(LENGTHS) // ranks)
    parts = [model.supervise(part, 3) for part in share.split(MICRO_BATCH)]
    (targets,) = joined.world.sum([sum(part.count for part in parts)])
    candidates = None
    if model.needs_global_targets:
        candidates = joined.world.gather(torch.cat([part.targets_S for part in parts]))
    before = {name: whole(value, joined.world) for name, value in stepping.tensors().items()}
    stepping.forward_backward(parts, StepContext(5, candidates), int(targets))
    norm = stepping.step(1.0)
    moved = {name: before[name] - whole(value, joined.world) for name, value in stepping.tensors().items()}
    return {"moved": moved, "norm": None if norm is None else float(norm), "targets": int(targets)}


def every_step() -> dict:
    with processes("cpu", threads=1) as joined:
        return {case: step_of(joined, *case) for case in CASES}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Number of processes -> the steps of each of them, by case."""
    folder = tmp_path_factory.mktemp("gradients")
    many = {ranks: in_group(every_step, ranks, folder / str(ranks)) for ranks in (2, 4)}
    return {1: [every_step()], **many}


# A number of a gradient is a sum over at most 30 targets x 8 candidates, which processes and micro-batches add in any
# order, and its move is a difference of parameters below 1, each rounded: in parts of the largest move of its tensor,
# of which none is below LEAST.  Errors of a few such sums add up through the layers, and both sides round: x 4.
LEAST = 0.001
ROUNDED = UNIT[torch.float32] / LEAST
BOUND = 4 * (float(growth(30 * 8)) * UNIT[torch.float32] + ROUNDED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_is_the_same_on_one_two_and_four_processes_in_all_its_parts(steps, case):
    (alone,) = (by_case[case] for by_case in steps[1])
    _, _, objective, clip = case
    reference = steps[1][0]["local", "all_reduce", objective, clip]
    assert alone["targets"] == reference["targets"] == sum(max(n - 1, 0) for n in LENGTHS)
    for ranks, by_rank in steps.items():
        for rank, by_case in enumerate(by_rank):
            found = by_case[case]
            assert found["targets"] == alone["targets"]
            assert found["moved"].keys() == reference["moved"].keys()
            for name, moved in reference["moved"].items():
                largest = moved.abs().max()
                assert largest > LEAST, f"{name} hardly moves: the case shows nothing"
                error = (found["moved"][name] - moved).abs().max() / largest
                assert error <= BOUND, f"{name} on rank {rank} of {ranks}"
            if clip is not None:
                assert found["norm"] == pytest.approx(reference["norm"], rel=BOUND)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("engine", PLAIN)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_clipping_scales_everything_by_one_norm_over_everything(steps, table, engine, objective, ranks):
    for by_case in steps[ranks]:
        plain, clipped = (by_case[table, engine, objective, clip] for clip in (None, CLIP))
        squares = sum(float((moved.double() / RATE).square().sum()) for moved in plain["moved"].values())
        count = sum(moved.numel() for moved in plain["moved"].values())
        # moves are off by a rounding of parameters below 1, or two, and the norm by that of a sum of their squares
        off = 2 * math.sqrt(count) * UNIT[torch.float32] / RATE / math.sqrt(squares)
        off += float(growth(count)) * UNIT[torch.float32]
        assert clipped["norm"] == pytest.approx(math.sqrt(squares), rel=off)
        assert clipped["norm"] > 2 * CLIP
        for name, moved in plain["moved"].items():
            expected = moved * (CLIP / (clipped["norm"] + 1e-6))
            error = (clipped["moved"][name] - expected).abs().max() / expected.abs().max()
            assert error <= BOUND + 2 * UNIT[torch.float32] / float(expected.abs().max()), name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_process_has_the_same_bits_after_a_step(steps, case, ranks):
    first, *others = (by_case[case] for by_case in steps[ranks])
    for other in others:
        assert other["norm"] == first["norm"]
        assert [n for n, moved in first["moved"].items() if not torch.equal(moved, other["moved"][n])] == []


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("clip", [None, CLIP])
def test_both_engines_take_the_same_step_to_the_bit_on_two_processes(steps, table, objective, clip):
    """Two numbers are added one way only, whatever the buckets."""
    one, other = (steps[2][0][table, engine, objective, clip]["moved"] for engine in ("ddp", "all_reduce"))
    assert [name for name, moved in one.items() if not torch.equal(moved, other[name])] == []


def axes() -> list:
    """What the axes of 2 x 2 processes say, and which ranks they join."""
    found: list = []
    with processes("cpu", threads=1, context=2) as joined:
        mine = [1.0 if rank == joined.world.rank else 0.0 for rank in range(4)]
        for axis in (joined.world, joined.data, joined.context, joined.local):
            found.append([axis.rank, axis.size])
        found += [axis.sum(mine) for axis in (joined.data, joined.context)]
        rows, counts = joined.world.exchange(torch.arange(4) * 10 + joined.world.rank, [1, 0, 2, 1])
        found += [rows.tolist(), counts]
        numbers = torch.full((5,), float(joined.world.rank))
        numbers[joined.world.rank] = torch.nan
        found.append(joined.world.maximum_of(numbers).tolist())
    return found


def test_processes_stand_on_axes(tmp_path):
    """Along ``context`` neighbours share a sequence; along ``data`` each has other samples."""
    found = in_group(axes, 4, tmp_path / "axes")
    for rank, (world, data, context, local, with_data, with_context, rows, counts, most) in enumerate(found):
        assert world == local == [rank, 4] and data == [rank // 2, 2] and context == [rank % 2, 2]
        assert with_data == [float(other % 2 == rank % 2) for other in range(4)]
        assert with_context == [float(other // 2 == rank // 2) for other in range(4)]
        sent = [[0], [], [10, 20], [30]][rank]
        assert rows == [row + sender for sender in range(4) for row in sent] and counts == [len(sent)] * 4
        assert all(map(math.isnan, most[:4])) and most[4] == 3.0, "whoever has a NaN, all know of it"
