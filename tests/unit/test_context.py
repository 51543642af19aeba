"""Processes that share sequences compute what one does: here as threads, which hand each other rows through queues."""

import itertools
import queue
import threading
from dataclasses import dataclass, field, replace

import pytest
import torch

from benchmarks.training import context as memory_benchmark
from gr.batch import Jagged
from gr.errors import UserError
from gr.models import context, dropout
from gr.models.context import check_shareable
from gr.models.cut import Cut, cut
from gr.models.hstu import HSTU as HSTU_ENCODER
from gr.models.step import StepContext
from gr.models.tasks import Known
from gr.processes import Axis, _on_mesh
from gr_kernels.dispatch import preferring
from tests.precision import UNIT, growth
from tests.unit import test_models_ranking as ranking
from tests.unit.models_common import (
    batch,
    in_double,
    layout,
    loss_of,
    named,
    randomise,
    retrieval,
    run_config,
)

LENGTHS = (9, 0, 1, 15, 8, 2, 43)  # odd, empty, and shorter than a group
ITEMS = 40
HSTU = {"name": "hstu", "heads": 2, "qk_dim": 6, "v_dim": 4, "attention_dropout": 0.2}
MODELS = {
    "silu": {"encoder": HSTU},
    "softmax": {"encoder": {**HSTU, "activation": "softmax", "layers": 1}},
    "sasrec": {"encoder": {"name": "sasrec", "layers": 1, "heads": 2}},
    "bidirectional": {
        "encoder": {"name": "transformer", "layers": 1, "heads": 2, "causal": False, "input_norm": True},
        "task": "cloze",
    },
    "ranking": {},
}


@dataclass
class Post:
    """What threads have sent each other: a queue for each pair of them."""

    between: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def queue(self, source, to):
        with self.lock:
            return self.between.setdefault((source, to), queue.Queue())


def exchange(axis, sent, to, received, source):
    """Axis.swap between threads."""
    if sent.numel():
        axis.group.queue(axis.rank, to).put(sent.clone())

    def wait():
        if received.numel():
            received.copy_(axis.group.queue(source, axis.rank).get(timeout=60))

    return wait


def together(work, size, monkeypatch):
    """What ``work(axis)`` returns on each of ``size`` threads that share sequences."""
    monkeypatch.setattr(Axis, "swap", exchange)
    monkeypatch.setattr(context, "PIECE", 8)
    post, results, failures = Post(), [None] * size, []

    def run(rank):
        try:
            results[rank] = work(Axis(rank, size, post))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def model_and_batch(name, lengths):
    sections = {"input": {"dropout": 0.3}}
    if name == "ranking":
        sections |= {"encoder": HSTU, "hidden_dropout": 0.3}
        return ranking.build(data={"path": "none", "max_length": 64}, model=sections), ranking.labelled(
            lengths
        )
    config = run_config(length=64, **MODELS[name], model=sections)
    return randomise(retrieval(config, ITEMS)), batch(lengths, items=ITEMS)


def losses_and_gradients(axis, name, lengths):
    """Of a training micro-batch, this process's part of them."""
    model, samples = model_and_batch(name, lengths)
    part = in_double(model).supervise(samples, 5, 11).part_of(axis)
    with preferring(
        "reference"
    ):  # dropout's bits come from counters: threads have one generator between them
        loss = loss_of(model, part, StepContext(5))
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named(model).items()}
    return {"loss": loss.detach(), "targets": torch.tensor(float(part.count)), **gradients}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_one_process(name, size, monkeypatch):
    one = losses_and_gradients(Axis(), name, LENGTHS)
    parts = together(lambda axis: losses_and_gradients(axis, name, LENGTHS), size, monkeypatch)
    # two layers of a dozen sums each, forward and backward, of at most as many terms as the batch has rows
    share = 2 * 48 * float(growth(sum(LENGTHS))) * UNIT[torch.float64]
    for key, expected in one.items():
        found = sum(part[key] for part in parts)
        difference = (found - expected).abs().max()
        assert difference <= share * expected.abs().max(), (key, float(difference / expected.abs().max()))
    assert all(part["loss"] != 0 for part in parts), "everybody has something to do"


@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 1)])
def test_processes_without_rows_take_part(lengths, monkeypatch):
    """Of three rows and one, the first process has all; of none, nobody has any."""
    if lengths and max(lengths):
        one = losses_and_gradients(Axis(), "silu", lengths)
    parts = together(lambda axis: losses_and_gradients(axis, "silu", lengths or (0,)), 3, monkeypatch)
    for part in parts[1:]:
        assert not any(value.any() for value in part.values())
    if lengths and max(lengths):
        assert torch.allclose(parts[0]["loss"], one["loss"], rtol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_what_is_kept_for_the_backward_pass_is_shared(activation, monkeypatch):
    """Nobody keeps keys or values of the others."""
    encoder = randomise(HSTU_ENCODER.Config(**{**HSTU, "activation": activation, "layers": 1}).build(16, 512))

    def kept(axis):
        return memory_benchmark.step(encoder, axis, 512)["kept_mib"]

    one = kept(Axis())
    assert max(together(kept, 4, monkeypatch)) <= 1.02 * one / 4  # two weight matrices apart


@pytest.mark.parametrize("size", [2, 3, 4])
def test_everybody_has_other_rows(size):
    whole = layout(LENGTHS)
    parts = [cut(whole, Axis(rank, size)) for rank in range(size)]
    numbers = torch.cat([part.cut.numbers_T for part in parts])
    assert torch.equal(numbers.sort().values, torch.arange(whole.rows))
    for part in parts:
        rows = part.cut.numbers_T
        assert part.rows == len(rows) and part.offsets_B1.diff().tolist() == list(part.lengths)
        assert part.max_length == max(part.lengths)
        assert torch.equal(part.positions_T, whole.positions_T[rows])
        assert torch.equal(part.query_times_T, whole.query_times_T[rows])
        assert torch.equal(part.key_times_T, whole.key_times_T[rows])
        for sequence, position in zip(part.sequences_T.tolist(), part.positions_T.tolist(), strict=True):
            stretch = part.cut.held_by(part.cut.axis.rank)[sequence // len(LENGTHS)]
            begin = stretch.starts_B[sequence % len(LENGTHS)]
            assert begin % 4 == 0 and begin <= position < begin + part.lengths[sequence]


@pytest.mark.parametrize("most", [4, 8, 1000])
@pytest.mark.parametrize("lengths", [(), (0, 0), (3,), (8, 0, 1, 24, 2), (1, 1, 1, 40)])
def test_pieces_are_small_and_cut_sequences_at_fours(lengths, most):
    edges = context._edges(lengths, most)
    assert edges[0] == 0 and edges[-1] == sum(lengths)
    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    for begin, end in itertools.pairwise(edges):
        assert begin <= end <= begin + most
        assert end == sum(lengths) or (end - max(b for b in begins if b <= end)) % 4 == 0


def test_work_is_level():
    """Pairs of a row and a key that it sees, and rows, of a long sequence: the same for all processes."""
    parts = [cut(layout((960,)), Axis(rank, 4)) for rank in range(4)]
    assert len({part.rows for part in parts}) == 1
    assert len({int((part.positions_T + 1).sum()) for part in parts}) <= 4
    work = [int((part.positions_T + 1).sum()) for part in parts]
    assert max(work) <= 1.001 * min(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 8])
def test_the_generator_drops_of_some_rows_what_it_drops_of_all(width, dtype, monkeypatch):
    monkeypatch.setattr(dropout, "_DRAWN", 40)  # several times
    whole = layout(LENGTHS)
    x = torch.randn(whole.rows, width, dtype=dtype)
    torch.manual_seed(3)
    every, state = dropout.generator_dropout(x, 0.3), torch.get_rng_state()
    for rank in range(4):
        some = Cut(whole, Axis(rank, 4))
        torch.manual_seed(3)
        found = dropout.generator_dropout(x[some.numbers_T], 0.3, some)
        assert torch.equal(found, every[some.numbers_T])
        assert torch.equal(torch.get_rng_state(), state), "everybody goes on from the same place"


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_known_at_some_rows_goes_with_them(size):
    """Features of hidden actions are left out: each process has those of its own rows, in their order."""
    whole = layout(LENGTHS)
    places = torch.arange(whole.rows)[torch.arange(whole.rows) % 3 != 1]
    known, every = Known(places * 10, places), Known(torch.arange(whole.rows) * 10)
    found = []
    for rank in range(size):
        some = Cut(whole, Axis(rank, size))
        part = known.part_of(some)
        assert torch.equal(some.numbers_T[part.places_F] * 10, part.rows_F)
        assert torch.equal(part.places_F, part.places_F.sort().values)
        assert torch.equal(every.part_of(some).rows_F, some.numbers_T * 10)
        found.append(part.rows_F)
    assert torch.equal(torch.cat(found).sort().values, known.rows_F)


@pytest.mark.parametrize("size", [2, 3])
def test_lists_that_are_known_at_some_rows_go_with_them(size):
    whole = layout(LENGTHS)
    lists = [list(range(row, row + row % 4)) for row in range(whole.rows)]
    places = torch.arange(whole.rows)[torch.arange(whole.rows) % 3 != 1]

    def known(rows):
        chosen = [lists[row] for row in rows]
        lengths = torch.tensor([0, *map(len, chosen)])
        return Jagged(lengths.cumsum(0), torch.tensor([v for values in chosen for v in values]))

    for rank in range(size):
        some = Cut(whole, Axis(rank, size))
        every = Known(known(range(whole.rows)), pooling="sum").part_of(some)
        part = Known(known(places.tolist()), places, "sum").part_of(some)
        shown = [row for row in some.numbers_T.tolist() if row % 3 != 1]
        assert every.pooling == part.pooling == "sum"
        for found, expected in ((every, some.numbers_T.tolist()), (part, shown)):
            expected = known(expected)
            assert torch.equal(found.rows_F.offsets, expected.offsets)
            assert torch.equal(found.rows_V, expected.values)


class Encoded(torch.nn.Module):
    cuttable = True
    vocabularies = {}


def test_what_cannot_be_shared_is_refused_in_a_sentence():
    config = run_config(train={"context": 4})
    check_shareable(Encoded(), config)
    refused = {
        "row after row": (replace_cuttable(False), config),
        "4, and a sequence has 3 rows at most": (Encoded(), run_config(length=3, train={"context": 4})),
        "engine fsdp": (Encoded(), run_config(train={"context": 2, "engine": "fsdp"})),
    }
    for words, (model, config) in refused.items():
        with pytest.raises(UserError, match=words) as caught:
            check_shareable(model, config)
        assert "\n" not in str(caught.value) and caught.value.everywhere
    assert not retrieval(run_config({"name": "gru4rec"}), ITEMS).cuttable
    assert retrieval(run_config(), ITEMS).cuttable
    with pytest.raises(UserError, match="6 processes can't be cut into groups of 4 that share a sequence"):
        _on_mesh(torch.device("cpu"), 0, 6, 4, Axis())


def replace_cuttable(value):
    model = Encoded()
    model.cuttable = value
    return model


def test_evaluation_asks_as_if_nobody_shared():
    from gr.processes import Processes

    shared = Processes(torch.device("cpu"), Axis(3, 4), Axis(1, 2), Axis(1, 2))
    whole = shared.of_whole_sequences()
    assert (whole.data, whole.context) == (Axis(3, 4), Axis()) and whole.world == shared.world
    assert replace(whole, data=shared.data, context=shared.context) == shared
