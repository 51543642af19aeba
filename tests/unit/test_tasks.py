"""Tasks: which actions are inputs, which are targets, and what is hidden."""

import pytest
import torch

from gr.batch import UNKNOWN
from gr.models.tasks import MASK, Cloze, NextItem
from tests.unit.models_common import LENGTHS, batch


def test_the_last_action_alone_can_be_the_target():
    """One query a sequence that has an input: its last row; of actions that may be targets, if it is one."""
    given = batch((9, 0, 1, 2, 6))
    whole = NextItem(NextItem.Config()).supervise(given, 1)
    last = NextItem(NextItem.Config(targets="last")).supervise(given, 1)
    assert last.queries_S.tolist() == [7, 8, 13] and torch.equal(last.tokens_T, whole.tokens_T)
    for name in ("targets_S", "ordinals_S", "positions_S"):
        assert torch.equal(getattr(last, name), getattr(whole, name)[last.queries_S])
    assert last.targets_S.tolist() == given.items_T[torch.tensor([8, 11, 17])].tolist()


def lists(values, lengths):
    return [part.tolist() for part in values.split(list(lengths))]


def test_next_item_pairs_every_action_with_the_one_before():
    b = batch()
    s = NextItem(NextItem.Config()).supervise(b, key=5)
    items, times = lists(b.items_T, LENGTHS), lists(b.timestamps_T, LENGTHS)
    inputs = [max(n - 1, 0) for n in LENGTHS]
    assert s.layout.lengths == tuple(inputs)
    assert s.layout.max_length == 8
    assert s.layout.offsets_B1.diff().tolist() == inputs
    assert lists(s.tokens_T, inputs) == [i[:-1] for i in items]
    assert lists(s.targets_S, inputs) == [i[1:] for i in items]
    assert lists(s.layout.query_times_T, inputs) == [t[1:] for t in times]
    assert lists(s.layout.key_times_T, inputs) == [t[:-1] for t in times]
    assert lists(s.positions_S, inputs) == [list(range(n)) for n in inputs]
    assert lists(s.ordinals_S, inputs) == [[int(o)] * n for o, n in zip(b.ordinals_B, inputs)]
    assert s.count == sum(inputs)
    rows = torch.arange(s.count)[:, None]
    assert torch.equal(s.select(rows), rows)


@pytest.mark.parametrize("task", [NextItem(NextItem.Config()), Cloze(Cloze.Config())])
@pytest.mark.parametrize("lengths", [LENGTHS, (), (0,), (1, 1), (3, 2)])
def test_request_asks_for_the_last_action_of_each_sequence_in_order(task, lengths):
    b = batch(lengths)
    s = task.request(b)
    expected = [i[-1] if i else UNKNOWN for i in lists(b.items_T, lengths)]
    assert s.targets_S.tolist() == expected
    assert s.ordinals_S.tolist() == b.ordinals_B.tolist()
    rows = s.layout.rows
    selected = s.select(torch.arange(1, rows + 1)[:, None]).squeeze(1).tolist()  # 0: no input
    ends = torch.tensor(s.layout.lengths, dtype=torch.int64).cumsum(0).tolist()
    assert selected == [end if n else 0 for end, n in zip(ends, s.layout.lengths)]


@pytest.mark.parametrize("task", [NextItem(NextItem.Config()), Cloze(Cloze.Config())])
def test_a_request_does_not_show_its_target(task):
    b = batch()
    ends = b.offsets_B1[1:][b.offsets_B1.diff() > 0] - 1
    other = b.with_columns(item=b.items_T.index_fill(0, ends, UNKNOWN))
    assert torch.equal(task.request(b).tokens_T, task.request(other).tokens_T)


@pytest.mark.parametrize("lengths", [LENGTHS, (), (0,), (1, 1), (30, 7)])
def test_cloze_looks_up_no_row_but_those_shown_or_asked_for(lengths):
    """An optimiser that moves the rows of a step must not move one that merely stood where an item was hidden."""
    b = batch(lengths)
    s = Cloze(Cloze.Config(mask_probability=0.3)).supervise(b, key=9)
    rows_T, shown_T = s.rows_T(masks=True), s.tokens_T != MASK
    assert torch.equal(rows_T[shown_T], b.items_T[shown_T])
    assert set(rows_T.tolist()) <= set(b.items_T[shown_T].tolist()) | set(s.targets_S.tolist())


def test_cloze_hides_what_it_asks_for_and_nothing_else():
    b = batch((30, 7, 1, 0, 12))
    s = Cloze(Cloze.Config(mask_probability=0.3)).supervise(b, key=9)
    hidden = s.tokens_T == MASK
    assert torch.equal(hidden.nonzero().squeeze(1), s.queries_S)
    assert torch.equal(b.items_T[hidden], s.targets_S)
    assert torch.equal(s.tokens_T[~hidden], b.items_T[~hidden])
    assert torch.equal(s.layout.positions_T[s.queries_S], s.positions_S)
    assert torch.equal(b.ordinals_B[s.layout.sequences_T[s.queries_S]], s.ordinals_S)
    assert all(
        part.any() for part in hidden.split([30, 7, 1, 0, 12]) if len(part)
    )  # each sample teaches something

    other_items = torch.where(hidden, (b.items_T + 1) % 40, b.items_T)
    other = Cloze(Cloze.Config(mask_probability=0.3)).supervise(b.with_columns(item=other_items), key=9)
    assert torch.equal(other.tokens_T, s.tokens_T)


def test_cloze_draws_hang_on_key_sample_and_position_alone():
    b = batch((30, 7, 12, 25))
    task = Cloze(Cloze.Config(mask_probability=0.3))
    whole = task.supervise(b, key=9).tokens_T
    halves = torch.cat([task.supervise(part, key=9).tokens_T for part in (b.slice(0, 1), b.slice(1, 4))])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, task.supervise(b, key=10).tokens_T)


def test_cloze_rates():
    lengths = (50,) * 400
    b = batch(lengths)

    def hidden(**config):
        tokens = Cloze(Cloze.Config(**config)).supervise(b, key=1).tokens_T
        return (tokens == MASK).view(400, 50)

    assert hidden(mask_probability=0.2).float().mean().item() == pytest.approx(0.2, abs=0.012)  # 4 sigma
    only_last = hidden(mask_probability=0.2, last_probability=0.25)
    alone = (only_last.sum(dim=1) == 1) & only_last[:, -1]
    assert alone.float().mean().item() == pytest.approx(0.25, abs=0.087)
    # which samples these are says nothing about what is hidden in the others, their first actions included
    assert only_last[~alone, 0].float().mean().item() == pytest.approx(0.2, abs=0.1)  # 4 sigma of some 300
    assert hidden(mask_probability=0.2, last_probability=1.0).nonzero()[:, 1].eq(49).all()
    assert hidden(mask_probability=1e-9)[:, -1].all()
