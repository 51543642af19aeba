"""Plans of sharded tables: what fits where, what is said where nothing does, and whose kernels move the rows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from gr import config as configs
from gr.embeddings import topology, torchrec_plan
from gr.embeddings.sharded import TorchRecTable
from gr.embeddings.table import TableSpec
from gr.embeddings.topology import GPUS, KEPT_BACK, Cluster, Hardware, imagined, named
from gr.embeddings.torchrec_plan import SHARDINGS, Wanted, plan, remedies
from gr.errors import UserError
from gr.models.step import StepContext
from gr.processes import Processes, processes
from gr.train.dry_run import plan_only
from gr.train.engines.ddp import DDP
from gr.train.optimizers import SGD, AdamW, LazyAdam, RowwiseAdagrad
from gr.train.plans import LINES
from tests.distributed.group import in_group
from tests.distributed.rounding import adamw, of_weights
from tests.end_to_end.tiny import make_dataset, write_config
from tests.packages import needs
from tests.unit.models_common import batch, engine_of, retrieval, run_config, whole

needs("torchrec", "fbgemm_gpu")

ITEMS, DIM, CLIP = 43, 8, 0.5
OPTIMIZERS = {
    "adamw": AdamW(AdamW.Config(lr=0.01)),
    "lazy_adam": LazyAdam(LazyAdam.Config(lr=0.01)),
    "rowwise_adagrad": RowwiseAdagrad(RowwiseAdagrad.Config(lr=0.05)),
    "momentum": SGD(SGD.Config(lr=0.3, momentum=0.5)),
    "sgd": SGD(SGD.Config(lr=0.3)),
}
GPU = Hardware(0, 2e12, 3e11, 25e9, 3e10)


def spec_of(rows: int, dim: int, optimizer: str = "adamw", bias: bool = False) -> TableSpec:
    return TableSpec("items", rows, dim, 0.02, 1, bias, OPTIMIZERS[optimizer].of_rows())


def gpus(memory: float, count: int, host: float = 0) -> Cluster:
    """So many GPUs with ``memory`` bytes for tables, on one machine with as much for each as ``host``."""
    kept = 1 - KEPT_BACK
    return Cluster(count, count, "cuda", replace(GPU, memory=int(memory / kept)), int(count * host / kept))


# -- hardware ------------------------------------------------------------------------------------------------------


def test_gpus_are_known_by_what_their_driver_calls_them():
    for name, known in {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }.items():
        assert named(name) == known
    with pytest.raises(
        UserError, match=r"'Tesla V100-SXM2-32GB'.*a100, h100, h200, b200 as model\.table\.topology"
    ):
        named("Tesla V100-SXM2-32GB")
    assert list(TorchRecTable.Config.model_fields["topology"].annotation.__args__) == list(topology.NAMES)


def test_a_cluster_grows_by_machines():
    on = imagined("h200", 20)
    assert (on.per_machine, on.device, on.hardware) == (8, "cuda", GPUS["h200"])
    assert on.of(3).per_machine == 3
    cpu = imagined("auto", 6, local=2)
    assert (cpu.per_machine, cpu.of(24).per_machine, cpu.room) == (2, 2, cpu.host_room)


# -- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plan_counts_the_rows_and_moments_that_are_kept(optimizer):
    """The bytes of a plan are those of the memory that is then made; and with less room than that it is refused, with a
    hundredth more (and what is exchanged: 2 MiB) it isn't."""
    spec = TableSpec("items", ITEMS, DIM, 0.02, 1, True, OPTIMIZERS[optimizer].of_rows())
    with processes("cpu", threads=1) as joined:
        table = TorchRecTable(TorchRecTable.Config(), spec, joined)
        moving = table.row_optimizer(spec.maths, [])
        weights, moments = (
            sum(pair) for pair in zip(*map(table.plan.bytes_of, table.plan.held), strict=True)
        )
        assert weights == sum(4 * piece.values_RC.numel() for piece in table.pieces())
        assert moments == sum(4 * m.numel() for of in moving.moments for m in of.values())
    large, width = spec_of(10_000_000, 32, optimizer), 32
    total = 4 * large.rows * (width * (1 + large.moments) + large.row_moments)
    for count in (1, 4):
        with pytest.raises(UserError, match="no plan puts table 'items'"):
            plan(large, width, Wanted("row_wise"), gpus(0.999 * total / count, count))
        _, found = plan(large, width, Wanted("row_wise"), gpus(1.01 * total / count + 2**21, count))
        assert sum(part.rows for part in found.held) == large.rows


@pytest.mark.parametrize("sharding", [s for s in SHARDINGS if s != "data_parallel"])
def test_a_table_that_is_too_large_is_refused_with_what_would_be_enough(sharding):
    """Each remedy is enough, and the next smaller one isn't."""
    spec, on, wanted = spec_of(40_000_000, 64), gpus(2e9, 8, host=4e9), Wanted(sharding)
    with pytest.raises(UserError) as refusal:
        plan(spec, 64, wanted, on)
    said = str(refusal.value)
    assert refusal.value.everywhere
    assert said.startswith(
        f"no plan puts table 'items' (40,000,000 rows x 64, 28.6 GiB with its moments) {sharding} on 8 processes with "
        "1.9 GiB for tables each (of the device's memory): it fits "
    )
    by_rows = replace(wanted, sharding="row_wise")
    (count,) = map(int, re.findall(r"on (\d+) processes \(\d+ machines of 8\)", said))
    assert plan(spec, 64, by_rows, on.of(count))
    with pytest.raises(UserError):
        plan(spec, 64, by_rows, on.of(count - 1))
    (dim,) = map(int, re.findall(r"with model\.dim=(\d+)", said))
    assert plan(replace(spec, dim=dim), dim, by_rows, on)
    with pytest.raises(UserError):
        plan(replace(spec, dim=dim + 4), dim + 4, by_rows, on)
    assert "with optimizer=rowwise_adagrad" in said and plan(
        spec_of(40_000_000, 64, "rowwise_adagrad"), 64, by_rows, on
    )
    assert "or with model.table.placement=host" in said and plan(
        spec, 64, replace(by_rows, placement="host"), on
    )


def test_where_only_the_sharding_is_at_fault_nothing_else_is_named():
    spec = spec_of(10_000_000, 64, "sgd")
    assert remedies(spec, 64, Wanted("table_wise"), gpus(2e9, 4)) == ["with model.table.sharding=row_wise"]
    assert remedies(spec, 64, Wanted("row_wise"), gpus(100, 4)) == [], "a row has more than that"


def refused_by_all() -> list[str]:
    said = []
    torchrec_plan.cluster = lambda topology, joined: gpus(1000, joined.world.size)
    with processes("cpu", threads=1) as joined:
        try:
            TorchRecTable(TorchRecTable.Config(), spec_of(ITEMS, DIM), joined)
        except UserError as error:
            said.append(str(error))
    return said


def test_every_process_hears_of_a_plan_that_does_not_fit(tmp_path):
    (first,), (second,) = in_group(refused_by_all, 2, tmp_path / "refused", by_hand=False)
    assert first == second and "on 2 processes with 0.0 GiB" in first


def test_tables_are_planned_for_processes_that_are_not_there(tmp_path, capsys):
    make_dataset(tmp_path / "data")
    file = write_config(tmp_path, tmp_path / "data", tmp_path / "run")
    config = configs.load(file, ["model.table={name: torchrec, sharding: row_wise, topology: h100}"])
    plan_only(config, 20)
    printed = capsys.readouterr().out
    lines = [line.split("│") for line in printed.splitlines() if "row_wise" in line]
    assert [int(line[1]) for line in lines] == list(range(LINES)), "sixty rows are three for each of twenty"
    assert all(line[4].strip() == "3 x 16" for line in lines)
    assert f"and {20 - LINES} more; most is on rank 0" in " ".join(printed.split())
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no table of this config is cut among processes"):
        plan_only(configs.override(config, ["model.table=local"]), 20)


# -- whose kernels -------------------------------------------------------------------------------------------------


def made(joined: Processes, optimizer: str, dim: int = DIM, clip: float | None = None, **table):
    encoder = {"name": "hstu", "layers": 1, "heads": 1, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
    bias = table.pop("bias", False)
    similarity = {"normalize": True, "temperature": 0.2, "item_bias": bias}
    section = {
        "table": table or "local",
        "similarity": similarity,
        "input": {"dropout": 0.0},
        "table_std": 0.5,
    }
    chosen = OPTIMIZERS[optimizer]
    run = run_config(
        encoder,
        {"name": "sampled_softmax", "negatives": 7},
        dim=dim,
        length=12,
        model=section,
        optimizer=chosen.config,
        train={"clip_norm": clip},
    )
    model = retrieval(run, ITEMS, processes=joined)
    return model, engine_of(model, chosen, clip, joined, DDP)


def train(joined: Processes, model, engine, steps: range) -> list[float]:
    losses, rank, ranks = [], joined.data.rank, joined.data.size
    for step in steps:
        every = batch((9, 7, 0, 3), ITEMS, seed=step).to(joined.device)
        share = every.slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        parts = [model.supervise(part, 3) for part in share.split(9)]
        (targets,) = joined.world.sum([sum(part.count for part in parts)])
        loss = engine.forward_backward(parts, StepContext(step), int(targets))
        losses.append(joined.world.sum([loss.item()])[0] / targets)
        model.standing(every, torch.arange(4, device=joined.device))  # a look-up that is no step
        engine.step(1 / (1 + step))
    return losses


def kernels_of_both() -> dict:
    found: dict = {}
    with processes("cpu", threads=1) as joined:
        for optimizer in ("sgd", "rowwise_adagrad"):
            for sharding in ("local", "row_wise", "table_wise"):
                fused = {"name": "torchrec", "sharding": sharding, "kernel": "fused"}
                model, engine = made(joined, optimizer, clip=CLIP, **({} if sharding == "local" else fused))
                losses = train(joined, model, engine, range(3))
                tensors = {name: whole(v, joined.world) for name, v in engine.tensors().items()}
                # gone on with elsewhere, from what a checkpoint has
                other, its = made(joined, optimizer, clip=CLIP, **({} if sharding == "local" else fused))
                wanted = its.load([*tensors])
                for name, value in wanted.items():
                    _fill(value, tensors[name])
                its.loaded(wanted)
                again = train(joined, other, its, range(3, 5))
                found[optimizer, sharding] = {"losses": losses + again, "tensors": tensors}
                found[optimizer, sharding]["fused"] = sharding != "local" and model.items.fused
    return found


def _fill(tensor, values):
    for offsets, part in getattr(tensor, "parts", {(0,) * tensor.dim(): tensor}).items():
        part.copy_(values[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return {1: [kernels_of_both()], 2: in_group(kernels_of_both, 2, folder / "2", by_hand=False)}


# Sums of at most 20 rows' gradients in another order, through five steps of half a gradient's size: 5 * log2(20)
# roundings of numbers below 1; a root and a quotient more for Adagrad, which divides gradients by their own size.
BOUND = 5 * (5 + 2) * 2.0**-23
WEIGHTS = {"sgd": BOUND, "rowwise_adagrad": of_weights(5, adamw(0.05), terms=20)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_fbgemms_kernels_train_as_our_own(kernels, optimizer, sharding, ranks):
    reference = kernels[1][0][optimizer, "local"]
    for rank in kernels[ranks]:
        here = rank[optimizer, sharding]
        assert here["fused"]
        assert here["losses"] == pytest.approx(reference["losses"], rel=BOUND)
        assert here["tensors"].keys() == reference["tensors"].keys()
        for name, value in reference["tensors"].items():
            bound = WEIGHTS[optimizer] * max(1, value.abs().max())
            assert (here["tensors"][name] - value).abs().max() <= bound, name


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host", "cached"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "lazy_adam"])
def test_fbgemms_kernels_train_as_our_own_on_a_gpu_wherever_the_rows_lie(optimizer, placement):
    found = []
    with processes("cuda", threads=1) as joined:
        for table in ({}, {"name": "torchrec", "placement": placement}):
            model, engine = made(joined, optimizer, **table)
            losses = train(joined, model, engine, range(5))
            found.append((losses, {name: whole(v).cpu() for name, v in engine.tensors().items()}))
        assert model.items.fused
    (expected, tensors), (losses, others) = found
    # Adam divides gradients by their own size: a move of 0.01 is off by that part of it, five times
    bound = BOUND + (5 * 0.01 * 2**-10 if optimizer == "lazy_adam" else 0)
    assert losses == pytest.approx(expected, rel=100 * bound)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert (others[name] - value).abs().max() <= bound * max(1, value.abs().max()), name


def test_kernels_that_are_not_exactly_the_optimizers_are_refused_with_the_reason():
    cases = {
        "no optimizer of exactly": {"optimizer": "adamw"},
        "ADAM is for GPUs alone": {"optimizer": "lazy_adam"},
        "item bias is a column": {"optimizer": "sgd", "bias": True},
        "divides by 4, and model.dim is 6 (next: 8)": {"optimizer": "sgd", "dim": 6},
    }
    with processes("cpu", threads=1) as joined:
        for why, case in cases.items():
            with pytest.raises(UserError) as refusal:
                made(joined, name="torchrec", kernel="fused", **case)
            said = str(refusal.value)
            assert said.startswith("model.table.kernel=fused can't be had: ") and said.endswith(
                "; use kernel=own"
            )
            assert why in said
        model, _ = made(joined, "sgd", name="torchrec")
        assert not model.items.fused, "on a CPU our own are the faster ones"


def test_what_a_cpu_or_a_row_cannot_have_is_refused_in_one_sentence():
    with processes("cpu", threads=1) as joined:
        with pytest.raises(UserError, match=r"placement=host is about where a GPU's table lies"):
            made(joined, "sgd", name="torchrec", placement="host")
    with pytest.raises(UserError, match=r"model\.table\.dtype.*rows are float32.*communication halves"):
        run_config(model={"table": {"name": "torchrec", "dtype": "bf16"}})


# -- rounded on the way --------------------------------------------------------------------------------------------

UNIT = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest error of a rounding, in parts of the number."""


def exchanged() -> dict:
    found: dict = {}
    with processes("cpu", threads=1) as joined:
        rows = torch.arange(joined.world.rank, ITEMS, 2)
        for communication in UNIT:
            for sharding in ("row_wise", "column_wise", "table_wise"):
                config = {"name": "torchrec", "sharding": sharding, "communication": communication}
                model, engine = made(joined, "sgd", **config)
                table = model.items
                view = table.view([rows])
                with torch.no_grad():
                    exact = table.view([rows])
                values = torch.randn(
                    len(rows), DIM, generator=torch.Generator().manual_seed(joined.world.rank)
                )
                values *= 1e-9  # as small as a row's part of a mean loss over many targets
                view.weight_UD.grad = values.clone()
                gradients = table.gather_gradients(view)
                dense = torch.zeros(ITEMS, DIM)
                for piece, gradient in zip(table.pieces(), gradients, strict=True):
                    count, columns = piece.values_RC.shape
                    block = dense[piece.row0 : piece.row0 + count, piece.col0 : piece.col0 + columns]
                    block += gradient.dense(0, count)
                found[communication, sharding] = {
                    "rows": view.weight_UD.detach(),
                    "exact": exact.weight_UD.detach(),
                    "sent": torch.zeros(ITEMS, DIM).index_copy(0, rows, values),
                    "arrived": joined.world.add_up(dense),
                    "loss": torch.tensor(train(joined, model, engine, range(2))),
                }
    return found


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    return in_group(exchanged, 2, tmp_path_factory.mktemp("rounded") / "2", by_hand=False)


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise", "table_wise"])
@pytest.mark.parametrize("communication", UNIT)
def test_rows_and_gradients_are_rounded_once_on_their_way_and_never_in_evaluation(
    rounded, sharding, communication
):
    """A row is off by one rounding of its numbers, a gradient by one of bfloat16 each process; with float32 by none."""
    start = TableSpec("items", ITEMS, DIM, 0.5, 1).first_rows(0, ITEMS)
    total = sum(rank[communication, sharding]["sent"] for rank in rounded)
    sizes = sum(rank[communication, sharding]["sent"].abs() for rank in rounded)
    for number, rank in enumerate(rounded):
        here, expected = rank[communication, sharding], start[number::2]
        assert torch.equal(here["exact"], expected)
        off = (here["rows"] - expected).abs()
        smallest = 2.0**-25 if communication == "fp16" else 0.0  # half of its least number
        assert (off <= UNIT[communication] * expected.abs() + smallest).all()
        unit = 0.0 if communication == "fp32" else UNIT["bf16"]
        assert ((here["arrived"] - total).abs() <= unit * sizes).all()
        assert bool(off.any()) == (here["arrived"] != total).any() == (communication != "fp32")
        exact = rounded[0]["fp32", sharding]["loss"]
        # the first loss has rounded rows in it, scores of at most 5 and of norms of rounded vectors
        assert (here["loss"] - exact).abs().max() <= 20 * UNIT[communication] * 5 + 1e-5
