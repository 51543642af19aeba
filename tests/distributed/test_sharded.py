"""A table sharded by TorchRec trains, ranks and is saved as a local one in one process is: by rows, by columns, whole,
and copied, on one, two and four processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from gr.embeddings import softmax, table as table_module
from gr.errors import UserError
from gr.models.step import StepContext
from gr.processes import Processes, processes
from gr.train import checkpoint, exported
from gr.train.cursor import Cursor
from gr.train.engines.ddp import DDP
from gr.train.engines.engine import parameters
from gr.train.exported import MANIFEST, Manifest, fingerprint, to_json
from gr.train.optimizers import SGD, AdamW, LazyAdam, RowwiseAdagrad
from gr.train.saved_weights import SavedWeights
from gr.train.tensor_files import layout, write
from tests.distributed.group import in_group
from tests.packages import needs
from tests.precision import after_steps
from tests.unit.models_common import batch, engine_of, retrieval, run_config, whole

needs("torchrec")

ITEMS, DIM, STEPS, CLIP = 43, 6, 5, 0.5  # neither divides evenly by two or four
LENGTHS = (9, 7, 0, 1, 1, 5, 12, 2)  # of four processes, the second has no target
QUERIES, BEST = 10, 30  # more than a shard has
LOGITS = 150  # at once: a few rows for the queries of a step or of a search
SHARDINGS = ("row_wise", "column_wise", "table_wise", "data_parallel", "auto")
OBJECTIVES = {
    "own": {"name": "sampled_softmax", "negatives": 7},
    "in_batch": {"name": "in_batch"},
    "full": {"name": "full_softmax"},
}
OPTIMIZERS = {
    "adamw": AdamW(AdamW.Config(lr=0.01, weight_decay=0.1)),
    "sgd": SGD(SGD.Config(lr=0.3, momentum=0.5)),
    "lazy_adam": LazyAdam(LazyAdam.Config(lr=0.01)),
    "rowwise_adagrad": RowwiseAdagrad(RowwiseAdagrad.Config(lr=0.05)),
}
CASES = [
    ("own", "adamw"),
    ("own", "lazy_adam"),
    ("own", "rowwise_adagrad"),
    ("in_batch", "sgd"),
    ("full", "adamw"),
    ("full", "sgd"),
]


def made(joined: Processes, table: dict | str, objective: str, optimizer: str):
    encoder = {"name": "hstu", "layers": 1, "heads": 1, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
    similarity = {"normalize": True, "temperature": 0.2, "item_bias": True, "eps": 1.0}
    section = {"table": table, "similarity": similarity, "input": {"dropout": 0.0}, "table_std": 0.5}
    run = run_config(encoder, OBJECTIVES[objective], dim=DIM, length=12, model=section)
    model = retrieval(run, ITEMS, processes=joined)
    return model, engine_of(model, OPTIMIZERS[optimizer], CLIP, joined, DDP)


def train(joined: Processes, model, engine, first: int = 0, last: int = STEPS) -> list[tuple[float, float]]:
    """Losses and norms of some steps; every process has a part of each batch, in micro-batches of few actions."""
    found, rank, ranks = [], joined.data.rank, joined.data.size
    for step in range(first, last):
        every = batch(LENGTHS, ITEMS, seed=step)
        share = every.slice(rank * len(LENGTHS) // ranks, (rank + 1) * len(LENGTHS) // ranks)
        cut = share.split(9)
        (most,) = joined.world.maximum([len(cut)])
        parts = [model.supervise(part, 3) for part in [*cut, *[share.slice(0, 0)] * (most - len(cut))]]
        (targets,) = joined.world.sum([sum(part.count for part in parts)])
        candidates = None
        if model.needs_global_targets:
            candidates = joined.world.gather(torch.cat([part.targets_S for part in parts]))
        loss = engine.forward_backward(parts, StepContext(step, candidates), int(targets))
        found.append((joined.world.sum([loss.item()])[0] / targets, engine.step(1.0).item()))
    return found


def own(rank: int, ranks: int) -> slice:
    """Which of the queries a process asks: as many as its rank, and one; alone all."""
    return slice(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2 if ranks > 1 else QUERIES)


def answers(joined: Processes, model) -> dict[str, torch.Tensor]:
    """Ranks and best rows of this process's own queries; every second target is among what is left out, and stays."""
    mine = own(joined.world.rank, joined.world.size)
    targets = torch.arange(QUERIES) * 7 % ITEMS
    left_out = [[5, *range(n), *[int(targets[n])] * (n % 2)] for n in range(QUERIES)][mine]
    exclude = (
        torch.tensor([0, *map(len, left_out)]).cumsum(0),
        torch.tensor([row for rows in left_out for row in rows]),
    )
    asked = batch((4,) * QUERIES, ITEMS, seed=8).slice(mine.start, mine.stop)
    scores, rows = model.topk(asked, BEST, exclude)
    standing = model.standing(asked, targets[mine], exclude)
    return {"ranks": standing.ranks_B, "losses": standing.losses_B, "scores": scores, "rows": rows}


def everything(folder: str) -> dict:
    found: dict = {}
    with processes("cpu", threads=1) as joined, pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "MAX_LOGITS", LOGITS)
        patch.setattr(table_module, "MAX_SCORES", LOGITS)
        for objective, optimizer in CASES:
            tables = ["local"] if joined.world.size == 1 else []
            for table in [*tables, *({"name": "torchrec", "sharding": s} for s in SHARDINGS)]:
                kind = table if isinstance(table, str) else table["sharding"]
                if kind == "column_wise" and optimizer == "rowwise_adagrad" and joined.world.size > 1:
                    continue
                if kind == "data_parallel" and (objective, optimizer) == ("full", "sgd"):
                    continue
                model, engine = made(joined, table, objective, optimizer)
                steps = train(joined, model, engine)
                tensors = {name: whole(values, joined.world) for name, values in engine.tensors().items()}
                if kind == "data_parallel" or kind == "local":
                    tensors = {name: values.clone() for name, values in engine.tensors().items()}
                found[objective, optimizer, kind] = {
                    "steps": steps,
                    "tensors": tensors,
                    **answers(joined, model),
                }
        for kind in SHARDINGS[:3]:
            model, engine = made(joined, {"name": "torchrec", "sharding": kind}, "own", "adamw")
            train(joined, model, engine, 0, 3)
            cursor = Cursor("g", step=3)
            checkpoint.save(
                Path(folder) / f"{joined.world.size}-{kind}", engine.tensors(), cursor, {}, joined
            )
            found["saved", kind] = {n: whole(v, joined.world) for n, v in engine.tensors().items()}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of processes -> what each of them found."""
    folder = tmp_path_factory.mktemp("sharded")
    many = {n: in_group(everything, n, folder / str(n), str(folder), by_hand=False) for n in (2, 4)}
    alone = [everything(str(folder))]
    for saved in folder.glob("*-*"):
        export(saved, folder / "exports" / saved.name)
    return folder, {1: alone, **many}


def export(saved: Path, out: Path) -> None:
    """The weights of a checkpoint as an export has them, written in one process: a table in three files."""
    path = checkpoint.newest(saved)
    assert path is not None
    out.mkdir(parents=True)
    weights = SavedWeights(path)
    files = layout(weights.sizes, 16 * DIM * 4)
    for name, parts in files.items():
        write(out / name, parts, lambda part: weights.rows(part.name, range(part.start, part.stop)))
    manifest = Manifest(
        *("", "", 3, 0, "g", "retrieval"),
        sizes={name: list(size) for name, size in weights.sizes.items()},
        tensors=files,
        files={name: fingerprint(out / name) for name in files},
    )
    (out / MANIFEST).write_text(to_json(manifest))


# Gradients are sums over 30 targets x 43 rows, which shards add in another order, and both sides round.  Of a relative
# change of the parameters losses have twice as much at most, as in test_golden_losses.py.  A step moves a parameter by
# its rate, and where Adam divides a gradient by its size the terms cancel down to a hundredth of theirs.
TERMS = 30 * ITEMS
LOSS = 2 * after_steps(STEPS, TERMS, condition=2.0)
MOVE = 100 * 0.01 * after_steps(STEPS, TERMS, condition=2.0)
SCORE = 5.0  # cosines over a temperature of 0.2


def assert_alike(steps, expected):
    """Losses and norms."""
    for found, others in zip(zip(*steps, strict=True), zip(*expected, strict=True), strict=True):
        assert found == pytest.approx(others, rel=LOSS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_rows_moments_and_ranks_are_a_local_tables(found, case, sharding, ranks):
    _, by_ranks = found
    (alone,) = by_ranks[1]
    reference = alone[*case, "local"]
    for rank, by_case in enumerate(by_ranks[ranks]):
        if (*case, sharding) not in by_case:
            pytest.skip("refused: see the test of refusals")
        here = by_case[*case, sharding]
        assert_alike(here["steps"], reference["steps"])
        assert here["tensors"].keys() == reference["tensors"].keys()
        for name, values in reference["tensors"].items():
            error = (here["tensors"][name] - values).abs().max()
            assert error <= MOVE + LOSS * float(values.abs().max()), (name, rank)
        mine = own(rank, ranks)
        assert torch.equal(here["ranks"], reference["ranks"][mine])
        assert torch.equal(here["rows"], reference["rows"][mine])
        torch.testing.assert_close(here["scores"], reference["scores"][mine], rtol=0, atol=LOSS * SCORE)
        # a loss moves by at most twice what scores do, and by the rounding of its own sum
        torch.testing.assert_close(here["losses"], reference["losses"][mine], rtol=0, atol=3 * LOSS * SCORE)


def loaded(folder: str) -> dict:
    """Whatever was saved, loaded into every sharding, and gone on with; and what was exported of it, loaded."""
    found: dict = {}
    with processes("cpu", threads=1) as joined:
        for saved in sorted(Path(folder).glob("*-*")):
            path = checkpoint.newest(saved)
            assert path is not None
            for kind in SHARDINGS[:3]:
                model, engine = made(joined, {"name": "torchrec", "sharding": kind}, "own", "adamw")
                assert checkpoint.load(path, model, engine).step == 3
                tensors = {n: whole(v, joined.world) for n, v in engine.tensors().items()}
                steps = train(joined, model, engine, 3)
                place = Path(folder) / "exports" / saved.name
                joined.together(partial(exported.load, place, model, world=joined.world))
                weights = {n: whole(v, joined.world) for n, v in parameters(model).items()}
                found[saved.name, kind] = {"tensors": tensors, "steps": steps, "exported": weights}
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_and_its_export_load_exactly_at_any_number_of_processes_and_sharding(
    found, tmp_path, ranks
):
    folder, by_ranks = found
    if ranks == 1:
        results = [loaded(str(folder))]
    else:
        results = in_group(loaded, ranks, tmp_path / "loaded", str(folder), by_hand=False)
    (alone,) = by_ranks[1]
    for by_case in results:
        assert len(by_case) == 3 * 3 * 3
        for (saved, _), here in by_case.items():
            number, kind = saved.split("-")
            written = by_ranks[int(number)][0]["saved", kind]
            assert here["tensors"].keys() == written.keys()
            assert [n for n, values in written.items() if not torch.equal(values, here["tensors"][n])] == []
            assert here["exported"].keys() == {name for name in written if name.startswith("model/")}
            assert all(torch.equal(values, written[name]) for name, values in here["exported"].items())
            assert_alike(here["steps"], alone["own", "adamw", "local"]["steps"][3:])


def refusals() -> list[str]:
    said = []
    with processes("cpu", threads=1) as joined:
        try:
            made(joined, {"name": "torchrec", "sharding": "column_wise"}, "own", "rowwise_adagrad")
        except UserError as error:
            said.append(str(error))
    return said


def test_what_a_sharding_cannot_do_is_refused_in_one_sentence(tmp_path):
    for said in in_group(refusals, 2, tmp_path / "refused", by_hand=False):
        assert said == [
            "optimizer rowwise_adagrad keeps one number a row, and of a table cut by columns each process would keep "
            "another one: use model.table.sharding=row_wise, or optimizer=lazy_adam"
        ]
    with pytest.raises(UserError, match="pooled tables only"):
        run_config(model={"table": {"name": "torchrec", "sharding": "grid"}})
    with pytest.raises(UserError, match="did you mean 'row_wise'"):
        run_config(model={"table": {"name": "torchrec", "sharding": "rowwise"}})
