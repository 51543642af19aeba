"""Views: the rows of a step, numbered anew; and a table that gives nothing else trains and ranks as a whole one does.

Shapes: U rows of a view, I rows of the table, D width.
"""

from __future__ import annotations

import pytest
import torch

from gr.embeddings import mapped, row_updates, table as table_module, view as view_module
from gr.embeddings.mapped import MappedTable
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import TableSpec
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.models.retrieval import Retrieval
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.engines.engine import parameters
from gr.train.optimizers import SGD, AdamW, LazyAdam, RowwiseAdagrad
from tests.precision import UNIT, growth, tolerance
from tests.unit.models_common import (
    batch,
    engine_of,
    fill,
    generator,
    local_table,
    retrieval,
    run_config,
    whole,
)

CPU = torch.device("cpu")
ALONE = Processes(CPU)
ITEMS, DIM = 57, 6
FORMS = {"marked": 10**6, "searched": -1}
WANTED = {
    "one tensor": [torch.tensor([5, 3, 3, 56, 0])],
    "shapes and types": [
        torch.tensor([[7, 2], [2, 9]], dtype=torch.int32),
        torch.tensor(44),
        torch.empty(0, dtype=torch.int32),
        torch.tensor([9, 7, 56]),
    ],
    "every row": [torch.arange(ITEMS).flip(0)],
    "none": [torch.empty(0, dtype=torch.int64)],
}


def mapped_table(rows, dim, std=1.0, seed=1, name="items", bias=False, folder=None):
    config = MappedTable.Config(folder=None if folder is None else str(folder))
    return MappedTable(config, TableSpec(name, rows, dim, std, seed, bias), ALONE)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(view_module, "SPARSE", FORMS[request.param])
    return request.param


# -- numbering ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_the_rows_of_a_step_are_numbered_once_in_ascending_order(form, wanted):
    numbering = Numbering.of(wanted, ITEMS, CPU)
    asked = sorted({row for part in wanted for row in part.reshape(-1).tolist()})
    marked = form == "marked" and bool(asked)  # nothing to mark for a step that asks for nothing
    every = marked and len(asked) == ITEMS
    assert numbering.every == every and (numbering.position_I is not None) == (marked and not every)
    assert numbering.rows_U.dtype == torch.int64 and numbering.rows_U.tolist() == asked
    for part in wanted:
        placed = numbering.place(part)
        assert placed.dtype == part.dtype and placed.shape == part.shape
        assert torch.equal(numbering.rows_U[placed.long()], part.long())
    assert numbering.place(numbering.rows_U).tolist() == list(range(len(asked)))


@pytest.mark.parametrize("at_once", [1, 1 << 16])
def test_where_every_row_is_wanted_many_times_rows_are_their_own_numbers(monkeypatch, at_once):
    monkeypatch.setattr(view_module, "MARKED_AT_ONCE", at_once)
    wanted = [torch.arange(ITEMS).repeat(3)[:-1], torch.tensor([[ITEMS - 1, 4]], dtype=torch.int32)]
    numbering = Numbering.of(wanted, ITEMS, CPU)
    assert numbering.every and torch.equal(numbering.rows_U, torch.arange(ITEMS))
    rows, vector_I = torch.tensor([[5, 56]], dtype=torch.int32), torch.randn(ITEMS)
    assert numbering.place(rows) is rows
    assert View(torch.empty(ITEMS, DIM), None, numbering).part_of(vector_I) is vector_I
    # one row is missing, and asking for the others again doesn't bring it
    most = [torch.arange(ITEMS - 1).repeat(9)]
    numbering = Numbering.of(most, ITEMS, CPU)
    assert not numbering.every and numbering.rows_U.tolist() == list(range(ITEMS - 1))


def test_numbers_are_found_by_search_where_the_table_is_large_beside_the_step():
    wanted = [torch.tensor([3, 1])]
    assert Numbering.of(wanted, 2 * view_module.SPARSE, CPU).position_I is not None
    assert Numbering.of(wanted, 2 * view_module.SPARSE + 1, CPU).position_I is None
    huge = Numbering.of([torch.tensor([10**12, 5])], 10**12 + 1, CPU)  # no vector of so many numbers is made
    assert huge.place(torch.tensor([5, 10**12, 5])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_view_looks_up_the_tables_rows_and_adds_up_the_gradients_of_repeats(form, dtype):
    table = mapped_table(ITEMS, DIM, bias=True)
    table.bias_I.copy_(torch.arange(ITEMS))
    rows = torch.tensor([[5, 3], [56, 5], [0, 5]], dtype=dtype)
    view = table.view([rows])
    assert view.weight_UD.shape == (4, DIM) and view.bias_U.tolist() == [0, 3, 5, 56]
    vectors = view.lookup(rows)
    assert torch.equal(vectors.detach(), table.weight_ID[rows.long()])
    weights = torch.randn(vectors.shape, generator=generator())
    (vectors * weights).sum().backward()
    expected = torch.zeros(ITEMS, DIM).index_add(0, rows.reshape(-1).long(), weights.reshape(-1, DIM))
    torch.testing.assert_close(view.weight_UD.grad, expected[[0, 3, 5, 56]], **tolerance(3, size=5.0))
    weight, bias = table.gather_gradients(view)
    assert weight.rows_U.tolist() == bias.rows_U.tolist() == [0, 3, 5, 56]
    assert torch.equal(weight.values_UC, view.weight_UD.grad)
    assert not bias.values_UC.any(), "a column that took no part in the loss has no gradient"


def test_a_view_has_its_part_of_a_vector_over_the_table(form):
    vector_I = torch.randn(ITEMS, generator=generator())
    for wanted in WANTED.values():
        numbering = Numbering.of(wanted, ITEMS, CPU)
        part = View(torch.empty(len(numbering.rows_U), DIM), None, numbering).part_of(vector_I)
        assert torch.equal(part, vector_I[numbering.rows_U])


def test_the_view_of_a_local_table_is_the_table():
    table = local_table(ITEMS, DIM, bias=True)
    view, rows = table.view(), torch.tensor([[4, 4], [56, 0]], dtype=torch.int32)
    assert view.weight_UD is table.weight and view.bias_U is table.bias
    assert view.place(rows) is rows
    assert view.part_of(table.bias) is table.bias
    assert torch.equal(view.lookup(rows), table.weight[rows.long()])


def test_a_step_that_wants_no_row_has_an_empty_view():
    table = mapped_table(ITEMS, DIM)
    for wanted in ([], [torch.empty(0, dtype=torch.int32)]):
        view = table.view(wanted)
        assert view.weight_UD.shape == (0, DIM)
        assert view.lookup(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)
        assert table.gather_gradients(view)[0].rows_U.tolist() == []


# -- a mapped table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [DIM, 20 * DIM, 1 << 22])
def test_a_mapped_table_starts_as_a_local_one_and_lies_where_it_is_told(monkeypatch, tmp_path, chunk):
    monkeypatch.setattr(row_updates, "CHUNK_NUMBERS", chunk)
    table = mapped_table(ITEMS, DIM, seed=3, bias=True, folder=tmp_path)
    assert torch.equal(table.weight_ID, local_table(ITEMS, DIM, seed=3).weight)
    assert not table.bias_I.any()
    (folder,) = tmp_path.iterdir()
    assert (folder / "weight").stat().st_size == 4 * ITEMS * DIM
    piece = table.pieces()[0]
    assert [n for bounds in piece.chunks() for n in range(*bounds)] == list(range(ITEMS))
    assert max(stop - start for start, stop in piece.chunks()) == min(max(chunk // DIM, 1), ITEMS)
    del table, piece
    assert not list(tmp_path.iterdir()), "scratch goes with the table"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"model\.table\.folder '.*none' can't be written to .*choose another"
    ):
        mapped_table(ITEMS, DIM, folder=tmp_path / "none")


QUERIES = 5


@pytest.mark.parametrize(
    ("max_scores", "chunk"), [(1 << 24, 1 << 22), (QUERIES * 20, 1 << 22), (1, 1), (90, 7 * DIM)]
)
@pytest.mark.parametrize(
    "scoring", [Scoring(2.0, 1e-6), Scoring(0.5, None, bias=True)], ids=["cosine", "bias"]
)
def test_a_mapped_table_answers_for_the_catalogue_as_a_local_one(monkeypatch, max_scores, chunk, scoring):
    """Every score is the same inner product of the same numbers: the answers in one chunk and in several agree to
    what float32 can tell, and are the same bits where both tables cut alike."""
    kinds = (local_table, mapped_table)
    tables = [make(ITEMS, DIM, seed=3, bias=True) for make in kinds]
    for table in tables:
        (bias,) = (piece.values_RC for piece in table.pieces() if piece.column == "bias")
        bias.copy_(torch.randn(ITEMS, generator=generator(1))[:, None])
    queries = torch.randn(QUERIES, DIM, generator=generator())
    targets = torch.tensor([0, 56, 7, 31, 9])
    offsets = torch.tensor([0, 3, 3, 4, 24, 24])
    exclude = (offsets, torch.cat([torch.tensor([0, 5, 5, 31]), torch.arange(20, 40)]))
    whole = tables[0].scores(queries, scoring)
    monkeypatch.setattr(table_module, "MAX_SCORES", max_scores)
    monkeypatch.setattr(mapped, "CHUNK_NUMBERS", chunk)
    cuts = [-(-ITEMS // table.chunk_rows(QUERIES)) for table in tables]
    assert cuts[1] >= cuts[0] and (cuts == [1, 1]) == (max_scores >= 1 << 22)

    local, other = ([t.scores(queries, scoring), *t.topk(queries, 9, scoring, exclude)] for t in tables)
    # a score is scale * sum of D products (+ bias): two orders of addition differ by that of both
    bound = 2 * float(growth(DIM + 1)) * UNIT[torch.float32] * float(whole.abs().max() + 10)
    assert (other[0] - whole).abs().max() <= bound
    assert (local[1] - other[1]).abs().max() <= bound
    if cuts[0] == cuts[1]:
        assert all(torch.equal(a, b) for a, b in zip(local, other, strict=True))
    assert torch.equal(local[2], other[2])
    for given in (None, exclude):
        ranks = [t.standing(queries, targets, scoring, given).ranks_B for t in tables]
        assert torch.equal(*ranks)


# -- training ------------------------------------------------------------------------------------------------------

STEPS = 6
GROUPS = [{"match": r"tables\..*bias", "lr": 0.05, "weight_decay": 0.0}, {"match": "uvqk", "lr": 0.003}]
OPTIMIZERS = {
    "adamw": AdamW.Config(lr=0.01),
    "adamw, decay and groups": AdamW.Config(lr=0.01, weight_decay=0.1, groups=GROUPS),
    "sgd": SGD.Config(lr=0.05),
    "sgd, groups": SGD.Config(lr=0.05, groups=[{"match": r"tables\.items\.bias", "lr": 0.5}]),
    "sgd, momentum": SGD.Config(lr=0.05, momentum=0.9),
    "sgd, decay": SGD.Config(lr=0.05, weight_decay=0.01),
    "sgd, a group's decay": SGD.Config(lr=0.05, groups=[{"match": r"items\.weight", "weight_decay": 0.1}]),
    "lazy_adam": LazyAdam.Config(lr=0.01, weight_decay=0.1),
    "rowwise_adagrad": RowwiseAdagrad.Config(lr=0.05),
}
OBJECTIVES = {
    "sampled_softmax": {"name": "sampled_softmax", "negatives": 9},
    "shared, popularity": {
        "name": "sampled_softmax",
        "negatives": 9,
        "shared": True,
        "sampling": "popularity",
        "logq": True,
    },
    "bce": {"name": "bce", "negatives": 3},
    "bpr": {"name": "bpr"},
    "in_batch": {"name": "in_batch"},
}
BIASED = {"normalize": False, "temperature": 1.0, "item_bias": True}


def model_of(kind, objective="sampled_softmax", biased=True, items=ITEMS, **changes) -> Retrieval:
    similarity = BIASED if biased else {"temperature": 0.1}
    model = {"table": kind, "similarity": similarity, "input": {"dropout": 0.0}, "table_std": 0.3}
    encoder = {"name": "hstu", "layers": 1, "heads": 1, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
    given = OBJECTIVES.get(objective, objective)
    built = retrieval(run_config(encoder, given, dim=DIM, model=model, **changes), items)
    return built


def train(model, engine, steps=range(STEPS)):
    """(sums of losses, norms) of so many steps, each of several micro-batches."""
    losses, norms = [], []
    for step in steps:
        parts = [model.supervise(part, step) for part in batch(items=ITEMS, seed=step).split(12)]
        targets = torch.cat([part.targets_S for part in parts])
        context = StepContext(step, targets if model.needs_global_targets else None)
        loss = engine.forward_backward(parts, context, len(targets))
        norm = engine.step(1 / (1 + step))
        losses.append(loss.item())
        norms += [] if norm is None else [norm.item()]
    return losses, norms


def both(objective="sampled_softmax", optimizer="adamw", clip_norm=None, biased=True, **changes):
    """(model, engine) with a local table, and with a mapped one."""
    for kind in ("local", "mapped"):
        model = model_of(kind, objective, biased, **changes)
        yield model, engine_of(model, OPTIMIZERS[optimizer].build(), clip_norm)


# Both kinds add in the same order.  What may differ in a step, in parts of a tensor's largest number: a row's rounding,
# 2 u (a chunk's last values don't fill a vector register; an update fuses its multiply and add, or doesn't), and, where
# gradients are clipped, the norm's: it is a sum of squares over all rows or over the view's, the zeros between change
# what is added to what. There are fewer than 1,000 of them, both are off by growth u, and roots by half as much.
BOUND = STEPS * (2 + float(growth(1000))) * UNIT[torch.float32]


def assert_same_training(pairs, trained):
    """Same losses, norms, rows and moments."""
    (one, its), (other, others) = pairs
    assert list(parameters(one)) == list(parameters(other))
    for mine, theirs in zip(*trained, strict=True):  # losses, then norms
        assert mine == pytest.approx(theirs, rel=BOUND)
    tensors, others_tensors = its.tensors(), others.tensors()
    assert tensors.keys() == others_tensors.keys()
    for name, value in others_tensors.items():
        value = whole(value)
        tensors[name] = whole(tensors[name])
        assert (value - tensors[name]).abs().max() <= BOUND * tensors[name].abs().max(), name


@pytest.mark.parametrize("biased", [False, True], ids=["cosine", "item bias"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_on_views(objective, biased):
    pairs = list(both(objective, "adamw, decay and groups" if biased else "adamw", biased=biased))
    rows = pairs[1][0].items.weight_ID
    before = rows.clone()
    assert_same_training(pairs, [train(*pair) for pair in pairs])
    assert ((rows - before).abs().amax(1) > 1e-3).sum() > ITEMS / 2, "the case hardly trains the table"


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6], ids=["unclipped", "clipped", "not reached"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_moves_a_mapped_table_as_a_local_one(monkeypatch, optimizer, clip_norm):
    monkeypatch.setattr(row_updates, "CHUNK_NUMBERS", 10 * DIM)  # several chunks, one of them short
    pairs = list(both(optimizer=optimizer, clip_norm=clip_norm))
    seen = optimizer in ("sgd", "sgd, groups", "lazy_adam", "rowwise_adagrad")  # of the others all rows move
    assert pairs[1][1].row_optimizers["items"].maths.all_rows != seen
    trained = [train(*pair) for pair in pairs]
    assert len(trained[0][1]) == (0 if clip_norm is None else STEPS)
    assert all((norm > clip_norm) == (clip_norm < 1) for norm in trained[0][1]), "the case clips what it says"
    assert_same_training(pairs, trained)


def test_one_number_of_one_row_that_is_none_is_noticed(monkeypatch):
    monkeypatch.setattr(row_updates, "CHUNK_NUMBERS", 10 * DIM)
    for model, engine in both():
        piece = next(p for p in model.items.pieces() if p.column == "weight")
        assert engine.finite()
        for row in (0, ITEMS - 1):
            kept = piece.values_RC[row, 2].clone()
            piece.values_RC[row, 2] = torch.nan
            assert not engine.finite()
            piece.values_RC[row, 2] = kept
        assert engine.finite()


def test_full_softmax_is_refused_in_one_sentence_when_the_model_is_built():
    with pytest.raises(UserError) as refusal:
        model_of("mapped", "full_softmax")
    assert str(refusal.value) == (
        "objective full_softmax needs the gradient of every row in every step, and model.table mapped fetches "
        "rows: use model.table=local, or another objective"
    )
    model_of("local", "full_softmax")


def test_queries_and_evaluation_read_the_mapped_rows():
    (local, engine), (other, _) = both()
    train(local, engine)
    for name, values in parameters(other).items():
        fill(values, parameters(local)[name])
    b = batch(items=ITEMS)
    assert torch.equal(local.encode(b), other.encode(b))
    assert torch.equal(local.scores(b), other.scores(b))
    targets = torch.arange(b.sequences)
    ours, theirs = local.standing(b, targets), other.standing(b, targets)
    assert torch.equal(ours.ranks_B, theirs.ranks_B) and torch.equal(ours.losses_B, theirs.losses_B)
    assert all(torch.equal(x, y) for x, y in zip(local.topk(b, 7), other.topk(b, 7), strict=True))


@pytest.mark.parametrize(
    "optimizer", ["adamw, decay and groups", "sgd", "sgd, momentum", "lazy_adam", "rowwise_adagrad"]
)
@pytest.mark.parametrize("first", [0, 1], ids=["local to mapped", "mapped to local"])
def test_a_checkpoint_of_one_kind_of_table_goes_on_in_the_other(tmp_path, optimizer, first):
    pairs = list(both(optimizer=optimizer))
    model, engine = pairs[first]
    train(model, engine, range(3))
    cursor = Cursor("g", step=3)
    path = checkpoint.save(tmp_path, engine.tensors(), cursor, {}, ALONE)
    uninterrupted = train(model, engine, range(3, STEPS))

    other, its_engine = list(both(optimizer=optimizer, train={"seed": 9}))[1 - first]
    assert checkpoint.load(path, other, its_engine) == cursor
    gone_on = train(other, its_engine, range(3, STEPS))
    assert_same_training([(model, engine), (other, its_engine)], [uninterrupted, gone_on])
