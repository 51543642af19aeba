"""Features: tables of declared columns, of users and of times beside the table of items."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
import torch

from gr import config as configs
from gr.batch import Jagged, SequenceBatch
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.models.step import StepContext
from gr.models.tasks import MASK
from gr.processes import Processes
from gr.train.changes import refuse_changes
from gr.train.engines.engine import parameters
from gr.train.optimizers import AdamW, LazyAdam, RowwiseAdagrad
from gr.train.snapshot import Snapshot, snapshot
from tests.precision import tolerance
from tests.unit.models_common import (
    LENGTHS,
    assert_slopes,
    batch,
    engine_of,
    generator,
    in_double,
    loss_of,
    named,
    randomise,
    run_config,
    train_step,
    whole,
)

ITEMS, DIM, DEVICES, AGES, TAGS, INTERESTS, GENRES, BRANDS = 40, 8, 5, 4, 6, 3, 7, 9
KNOWN_TOWNS = 2
USERS = 60
ALONE = Processes(torch.device("cpu"))
FEATURES = {
    "kind": "type",  # short for {column: type}
    "device": {"column": "device", "rows": DEVICES},
    "age": {"column": "age", "rows": AGES},
    "user": {"derived": "user"},
    "hour": {"derived": "hour_of_day"},
    "day": {"derived": "day_of_week"},
    "asked": {"derived": "hour_of_request"},
    "asked-day": {"derived": "day_of_request"},
    "tag": {"column": "tags", "rows": TAGS, "pooling": "sum"},
    "interest": {"column": "interests", "rows": INTERESTS},
    "genre": {"catalogue": "genres"},
    "brand": {"catalogue": "brand", "rows": BRANDS},
    "town": {"column": "town", "rows": KNOWN_TOWNS, "unseen": "own_row"},
    "paid": {"column": "paid", "number": "plain"},
    "balance": {"column": "balance", "number": "log"},
    "price": {"catalogue": "price", "number": "log"},
}
OF_ACTIONS, OF_USERS = ("kind", "device", "hour", "day"), ("age", "user")
TYPES = ["buy", "click", "view"]
ROWS = {
    "kind": len(TYPES),
    "device": DEVICES,
    "age": AGES,
    "user": USERS,
    "hour": 24,
    "day": 7,
    "asked": 24,
    "asked-day": 7,
    "tag": TAGS,
    "interest": INTERESTS,
    "genre": GENRES,
    "brand": BRANDS,
    "town": KNOWN_TOWNS + 1,
    "paid": 2,
    "balance": 2,
    "price": 2,
}
# An encoder's ten sums of up to 32 terms before the scores; a loss adds up some 25 targets of logits up to 20 and more.
LOSSES = {"terms": 32, "stages": 12, "size": 500.0}
LOSS = tolerance(**LOSSES)
KINDS = {
    "hstu": {},
    "sasrec": {"encoder": "sasrec", "objective": "bce"},
    "bert4rec": {"encoder": {"name": "transformer", "causal": False}, "task": "cloze"},
    "ranking": {"objective": None, "encoder": "hstu"},
}


@dataclass
class Described:
    """What a dataset says of its columns."""

    columns: list = field(
        default_factory=lambda: [
            ColumnInfo("item", "int32"),
            ColumnInfo("time", "int64"),
            ColumnInfo("type", "int32"),
            ColumnInfo("value", "float32"),
            ColumnInfo("device", "int64"),
            ColumnInfo("city", "string"),
            ColumnInfo("tags", "int32", multi=True),
            ColumnInfo("labels", "string", multi=True),
            ColumnInfo("town", "int64"),
            ColumnInfo("paid", "float32"),
            ColumnInfo("balance", "float32", "users"),
            ColumnInfo("age", "int32", "users"),
            ColumnInfo("interests", "int32", "users", multi=True),
        ]
    )
    action_type_names: list = field(default_factory=lambda: list(TYPES))
    users: int = USERS


def lists(count, rows, seed):
    """``count`` lists of none to three of ``rows`` numbers, the largest among them."""
    g = generator(seed)
    lengths = torch.randint(0, 4, (count,), generator=g)
    values = torch.randint(0, rows, (int(lengths.sum()),), generator=g)
    values[:1] = rows - 1
    return Jagged(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), values)


@dataclass
class Catalogue:
    column_names = ("item_id", "genres", "brand", "price", "name")
    kinds = {"genres": "int64", "brand": "int64", "price": "float64", "name": "string", "item_id": "int64"}
    rows: int = ITEMS
    manifest: Described = field(default_factory=Described)
    training_counts: torch.Tensor = field(default_factory=lambda: torch.arange(ITEMS))

    def info(self, name):
        return ColumnInfo(name, self.kinds[name], "items", name == "genres")

    def codes(self, name):
        return lists(ITEMS, GENRES, 8) if name == "genres" else torch.arange(ITEMS) * 5 % BRANDS

    def numbers(self, name):
        assert name == "price"
        prices = torch.randn(ITEMS, generator=generator(7)) * 3
        return prices.masked_fill(torch.arange(ITEMS) % 6 == 0, torch.nan)


def section(kind="hstu", features=None, table=None, task="next_item", **changes):
    chosen = dict(KINDS[kind])
    given = copy.deepcopy(FEATURES if features is None else features)
    if table is not None:
        given = {
            n: {**({"column": f} if isinstance(f, str) else f), "table": table} for n, f in given.items()
        }
    model = {"input": {"features": given, "dropout": 0.0}, **changes}
    if table is not None:
        model["table"] = table
    if kind != "ranking":
        return run_config(dim=DIM, task=chosen.pop("task", task), **chosen, model=model)
    tasks = {"like": {"column": "value", "at_least": 4}}
    model = {"name": "ranking", "dim": DIM, "encoder": "hstu", "tasks": tasks, **model}
    raw = {"data": {"path": "none", "max_length": 10}, "model": model, "optimizer": {"name": "adamw"}}
    return configs.from_dict(raw)


def build(kind="hstu", features=None, processes=None, dataset=None, **changes):
    run = section(kind, features, **changes)
    return run.model.build(run, Catalogue(manifest=dataset or Described()), processes)


def asked(lengths=LENGTHS, seed=0) -> SequenceBatch:
    b, g = batch(lengths, ITEMS, seed), generator(seed + 100)
    actions = b.actions
    columns = {
        "type": torch.randint(0, len(TYPES), (actions,), generator=g),
        "value": torch.randint(1, 6, (actions,), generator=g).float(),
        "device": torch.randint(0, DEVICES, (actions,), generator=g),
        "tags": lists(actions, TAGS, seed),
        "town": torch.randint(-1, KNOWN_TOWNS + 2, (actions,), generator=g),
        "paid": torch.randn(actions, generator=g).masked_fill(torch.arange(actions) % 5 == 0, torch.nan),
    }
    users = {
        "age": torch.randint(0, AGES, (len(lengths),), generator=g),
        "interests": lists(len(lengths), INTERESTS, seed),
        "balance": torch.randn(len(lengths), generator=g) * 2,
    }
    return replace(b.with_columns(**columns), user_columns=users)


# -- what is added --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hstu", "sasrec", "bert4rec"])
def test_inputs_are_the_sums_of_the_items_and_the_features_vectors(kind):
    model = in_double(randomise(build(kind))).eval()
    b = asked()
    seen = {}
    model.encoder.register_forward_hook(lambda module, given, result: seen.update(x=given[0]))
    part = model.supervise(b, 5)
    loss_of(model, part, candidates=part.targets_S)
    table = {name: values.weight.detach() for name, values in model.tables.items()}
    assert {name: len(values) for name, values in table.items()} == {"items": ITEMS, **ROWS}
    tags, interests, genres = b.columns["tags"], b.user_columns["interests"], Catalogue().codes("genres")
    brands, prices = Catalogue().codes("brand"), Catalogue().numbers("price")

    def pooled(name, column, place, mean=True):
        """One by one; zeros of an empty list."""
        values = column.values[column.offsets[place] : column.offsets[place + 1]].tolist()
        total = sum((table[name][v] for v in values), torch.zeros(DIM, dtype=torch.float64))
        return total / max(len(values), 1) if mean else total

    def times(name, number):
        number = number.double()
        if number.isnan():
            return table[name][1]
        return table[name][0] * (number if name == "paid" else number.sign() * (1 + number.abs()).log())

    scale, at, row = model.input.scale, 0, 0
    hidden = (part.tokens_T == MASK).tolist()
    for sample, length in enumerate(LENGTHS):
        inputs = length if kind == "bert4rec" else max(length - 1, 0)
        for position in range(inputs):
            place = at + position
            predicted = place if kind == "bert4rec" else place + 1
            when, then = (datetime.fromtimestamp(int(b.timestamps_T[p]), UTC) for p in (place, predicted))
            x = model.input.mask.detach() if hidden[row] else table["items"][b.items_T[place]]
            if not hidden[row]:
                x = x + table["kind"][b.columns["type"][place]] + table["device"][b.columns["device"][place]]
                x = x + table["hour"][when.hour] + table["day"][when.weekday()]
                x = x + pooled("tag", tags, place, mean=False) + pooled("genre", genres, b.items_T[place])
                x = x + table["brand"][brands[b.items_T[place]]]
                town = int(b.columns["town"][place])
                x = x + table["town"][town if 0 <= town < KNOWN_TOWNS else KNOWN_TOWNS]
                x = x + times("paid", b.columns["paid"][place]) + times("price", prices[b.items_T[place]])
            x = (
                x
                + pooled("interest", interests, sample)
                + times("balance", b.user_columns["balance"][sample])
            )
            x = x + table["age"][b.user_columns["age"][sample]] + table["user"][b.ordinals_B[sample]]
            x = x + table["asked"][then.hour] + table["asked-day"][then.weekday()]
            expected = scale * x + model.input.positions.detach()[position]
            torch.testing.assert_close(seen["x"][row].detach(), expected, rtol=1e-6, atol=1e-6)
            row += 1
        at += length
    assert row == len(seen["x"]) > 10 and (kind != "bert4rec" or any(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_every_table_agrees_with_finite_differences(kind):
    # twelve features of unit scale would bend the loss more than a difference may leave out
    model, b = in_double(randomise(build(kind), std=0.4)).eval(), asked()

    def loss():
        part = model.supervise(b, 5)
        return loss_of(model, part, candidates=part.targets_S)

    assert {f"tables.{name}.weight" for name in FEATURES} < named(model).keys()
    assert_slopes(model, loss, tolerance(**LOSSES, dtype=torch.float64)["atol"])


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_sum_to_the_batch(kind):
    model = randomise(build(kind)).eval()
    b = model.prepare(asked())
    targets = model.supervise(b, 5).targets_S
    together = loss_of(model, model.supervise(b, 5), candidates=targets)
    apart = sum(loss_of(model, model.supervise(part, 5), candidates=targets) for part in b.split(10))
    torch.testing.assert_close(together, apart, **LOSS)
    assert len(b.split(10)) > 2


# -- what must not be seen ------------------------------------------------------------------------------------------


def changed(b, places):
    """The batch with other features of the actions at ``places``."""
    columns = {
        "type": (b.columns["type"] + 1) % len(TYPES),
        "device": (b.columns["device"] + 1) % DEVICES,
    }
    tags = b.columns["tags"]
    others = torch.where(places.repeat_interleave(tags.offsets.diff()), (tags.values + 1) % TAGS, tags.values)
    columns = {n: torch.where(places, c, b.columns[n]) for n, c in columns.items()}
    return b.with_columns(**columns, tags=replace(tags, values=others))


def answers(model, b):
    return model.logits(b) if model.judged_by == "pointwise" else model.encode(b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_does_not_show_the_features_of_its_target(kind):
    # a ranking model is asked of given items, so that every sequence has an action
    model, b = randomise(build(kind)), asked((9, 1, 5, 8, 2))
    ends = torch.zeros(b.actions, dtype=torch.bool)
    ends[b.offsets_B1[1:][b.offsets_B1.diff() > 0] - 1] = True
    assert torch.equal(answers(model, b), answers(model, changed(b, ends)))
    assert not torch.equal(answers(model, b), answers(model, changed(b, ~ends)))
    other = replace(b, user_columns={**b.user_columns, "age": (b.user_columns["age"] + 1) % AGES})
    assert not torch.equal(answers(model, b), answers(model, other))
    later = b.with_columns(time=b.timestamps_T + torch.where(ends, 30 * 3600, 0))  # another hour and day
    assert not torch.equal(answers(model, b), answers(model, later)), "a request's time is known"


def test_hidden_actions_show_nothing_and_move_no_row():
    model, b = randomise(build("bert4rec")).eval(), asked()
    part = model.supervise(b, 5)
    hidden = part.tokens_T == MASK
    other = model.supervise(changed(b, hidden), 5)
    assert torch.equal(loss_of(model, part), loss_of(model, other))
    assert set(part.features["device"].rows_V.tolist()) == set(b.columns["device"][~hidden].tolist())
    # 40 hidden actions on a device of which nobody sees another action
    lonely = b.with_columns(device=torch.where(hidden, DEVICES - 1, b.columns["device"] % (DEVICES - 1)))
    model = build("bert4rec", table="mapped", processes=ALONE)
    before = model.tables["device"].weight_ID.clone()
    engine = engine_of(model, LazyAdam(LazyAdam.Config(lr=0.1)), processes=ALONE)
    train_step(engine, [model.supervise(part, 5) for part in lonely.split(10)])
    moved = (model.tables["device"].weight_ID != before).any(1)
    assert moved.tolist() == [True] * (DEVICES - 1) + [False]


# -- where the rows are -----------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "adamw": AdamW(AdamW.Config(lr=0.01, weight_decay=0.1)),
    "lazy_adam": LazyAdam(LazyAdam.Config(lr=0.01)),
    "rowwise_adagrad": RowwiseAdagrad(RowwiseAdagrad.Config(lr=0.01)),
}
STEPS = 4
# As in test_views.py: of a tensor's largest number a row's rounding and that of the norm, for which zeros change what
# is added to what, in each step.
BOUND = STEPS * (2 + 12) * 2.0**-24


@pytest.mark.parametrize("kind", ["hstu", "bert4rec", "ranking"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_elsewhere_train_as_rows_here(kind, optimizer):
    found = []
    for table in ("local", "mapped"):
        similarity = {} if kind == "ranking" else {"similarity": {"normalize": False, "temperature": 1.0}}
        model = build(kind, table=table, processes=ALONE, table_std=0.3, **similarity).eval()
        engine = engine_of(model, OPTIMIZERS[optimizer], clip_norm=0.5, processes=ALONE)
        losses = []
        for step in range(STEPS):
            parts = [model.supervise(part, step) for part in asked(seed=step).split(12)]
            losses.append(train_step(engine, parts, sum(part.count for part in parts), step)[0])
        found.append((losses, {name: whole(values) for name, values in engine.tensors().items()}))
    (losses, tensors), (other_losses, other_tensors) = found
    assert losses == pytest.approx(other_losses, rel=BOUND)
    assert tensors.keys() == other_tensors.keys()
    assert {f"model/tables.{name}.weight" for name in FEATURES} <= tensors.keys()
    for name in [name for name in tensors if "tables." in name]:
        error = (tensors[name] - other_tensors[name]).abs().max()
        assert error <= BOUND * tensors[name].abs().max(), name


def test_first_rows_depend_on_the_features_name_and_not_on_the_others():
    alone, beside = build(features={"device": FEATURES["device"]}), build()
    assert torch.equal(alone.tables["device"].weight, beside.tables["device"].weight)
    assert torch.equal(alone.items.weight, beside.items.weight)
    assert not torch.equal(beside.tables["hour"].weight, beside.tables["asked"].weight)
    assert {f"model/tables.{n}.weight" for n in FEATURES} < parameters(beside).keys()
    assert not {n for n in dict(beside.named_parameters()) if "tables" in n}, "tables stand beside the module"
    assert {f"tables.{n}.weight" for n in FEATURES} < named(beside).keys()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_needs_its_columns_and_no_others():
    assert build(features={}).needs == {"item", "time"}
    assert build("sasrec", features={}).needs == {"item"}
    assert build("sasrec", features={"user": {"derived": "user"}}).needs == {"item"}
    assert build("sasrec", features={"d": FEATURES["device"], "h": FEATURES["hour"]}).needs == {
        *("item", "device", "time")
    }
    others = {"tags", "interests", "town", "paid", "balance"}
    assert build("ranking").needs == {"item", "time", "value", "type", "device", "age"} | others


@pytest.mark.parametrize(
    "feature,said",
    [
        (
            {"column": "devise", "rows": 5},
            "'devise', which is no column of the dataset: did you mean 'device'",
        ),
        ({"column": "device"}, "'model.input.features.x.rows' is missing, and the dataset doesn't say"),
        ({"column": "type", "rows": 2}, "rows' is 2, and the dataset has 3 action types"),
        ({"column": "city", "rows": 5}, "that column holds text"),
        ({"column": "value", "rows": 5}, "that column holds numbers with decimals"),
        ({"column": "tags"}, "'model.input.features.x.rows' is missing"),
        ({"column": "labels", "rows": 5}, "that column holds text: give it a vocabulary"),
        (
            {"column": "device", "rows": 5, "pooling": "sum"},
            "column 'device' holds one value each, which there",
        ),
        ({"catalogue": "genre"}, "no column of the dataset's catalogue: did you mean 'genres'"),
        ({"catalogue": "name"}, "catalogue' is 'name', and that column holds text: give it a vocabulary"),
        ({"catalogue": "price"}, "that column holds numbers with decimals"),
        ({"catalogue": "genres", "rows": 3}, "column 'genres' of the catalogue holds 6, .* set it to 7"),
        ({"column": "item", "rows": 5}, "'item', which has a table already"),
        ({"column": "city", "number": "log"}, "column' is 'city', and that column holds text: choose one of"),
        ({"column": "tags", "number": "log"}, "column' is 'tags', and that column holds lists"),
    ],
)
def test_what_fits_no_column_is_refused_in_one_sentence(feature, said):
    with pytest.raises(UserError, match=said.replace("?", "[?]")):
        build(features={"x": feature})


def test_times_are_needed_for_what_is_derived_from_them():
    untimed = Described()
    untimed.columns = [info for info in untimed.columns if info.name != "time"]
    with pytest.raises(UserError, match="'hour_of_day' and the dataset has no times"):
        build("sasrec", features={"hour": {"derived": "hour_of_day"}}, dataset=untimed)


@pytest.mark.parametrize(
    "column,values,said",
    [
        (
            "device",
            [2, 7, 1],
            "column 'device' holds 7, and its table has rows for 0 to 4 .*: set it to 8 or more",
        ),
        ("device", [2, -3, 1], "column 'device' holds -3, .* map its values to 0, 1, 2"),
        ("tags", [0, 6], "column 'tags' holds 6, and its table has rows for 0 to 5"),
        ("age", [4], r"column 'age' holds 4, .*\(model.input.features.age.rows\).* or say unseen: own_row"),
        (
            "paid",
            [1.0, torch.inf, 2.0],
            r"column 'paid' holds inf \(model.input.features.paid\), which no model",
        ),
    ],
)
def test_a_value_without_a_row_is_named_before_anything_is_looked_up(column, values, said):
    model, b = build(), asked((3,))
    if column == "age":
        b = replace(b, user_columns={**b.user_columns, "age": torch.tensor(values)})
    elif column == "tags":
        b = b.with_columns(tags=Jagged(torch.tensor([0, 0, 2, 2]), torch.tensor(values)))
    else:
        b = b.with_columns(**{column: torch.tensor(values)})
    for look in (model.prepare, model.encode, lambda b: model.supervise(b, 1)):
        with pytest.raises(UserError, match=said):
            look(b)


def test_values_that_nobody_knows_are_counted_in_each_batch_and_share_a_row():
    model, b = build(), asked((3, 2))
    b = b.with_columns(
        town=torch.tensor([0, 1, -1, 9, 1]), paid=torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0])
    )
    prepared = model.prepare(b)
    assert prepared.columns[":town"].tolist() == [0, 1, 2, 2, 1]
    assert model.unseen()["town"] == (2, 5) and model.unseen()["paid"] == (1, 5)
    assert model.unseen()["balance"] == (0, 2) and "device" not in model.unseen()
    model.prepare(prepared)
    assert model.unseen()["town"] == (2, 5), "what is prepared isn't looked at again"


def test_lists_are_counted_on_the_host_where_they_lie_on_a_device():
    """As a batch is that went to one: offsets beside it on the host."""
    model, b = build(), asked(seed=3)
    columns = {
        n: replace(c, host_offsets=c.offsets) if isinstance(c, Jagged) else c for n, c in b.columns.items()
    }
    users = {
        n: replace(c, host_offsets=c.offsets) if isinstance(c, Jagged) else c
        for n, c in b.user_columns.items()
    }
    there = model.prepare(replace(b, columns=columns, user_columns=users))
    for part, known in ((there, True), (there.slice(1, 5), True), (model.prepare(b), False)):
        assert (part.columns[":tag"].host_offsets is not None) == known
        plain = model.supervise(b.slice(1, 5) if part.sequences == 4 else b, 5)
        found = model.supervise(part, 5)
        for name in ("tag", "interest", "genre"):
            assert torch.equal(found.features[name].rows_V, plain.features[name].rows_V), name


def test_no_sequence_at_all_is_legal():
    for kind in KINDS:
        model, nobody = build(kind), asked(())
        assert len(answers(model, nobody)) == 0
        loss_of(model, model.supervise(nobody, 1), StepContext(1)).backward()


@pytest.mark.parametrize(
    "features,said",
    [
        ({"items": "type"}, "'items' is a table of the items"),
        ({"a.b": "type"}, "'a.b' becomes the name of a table"),
        ({"x": {"column": "type", "derived": "user"}}, "give it one of column .* and derived"),
        ({"x": {"column": "type", "catalogue": "brand"}}, "give it one of column .* and derived"),
        ({"x": {"rows": 3}}, "give it one of column .* and derived"),
        ({"x": {"column": "type", "pooling": "max"}}, "pooling"),
        ({"x": {"derived": "hour_of_dya"}}, "model.input.features.x.derived"),
        ({"x": {"column": "type", "table": "lokal"}}, "did you mean 'local'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(features, said):
    with pytest.raises(UserError, match=said):
        section(features=features)


def test_features_are_laid_over_key_by_key_and_only_their_tables_may_change_on_resume():
    run = section()
    other = configs.override(run, ["model.input.features.device.table=mapped"])
    features = other.model.input.features
    assert features["device"].table.name == "mapped" and features["device"].rows == DEVICES
    assert features["kind"].column == "type" and features["kind"].table.name == "local"
    refuse_changes(run, other)
    for change in ("device.rows=9", "device.column=type", "hour.derived=day_of_week"):
        with pytest.raises(UserError, match="cannot change on resume"):
            refuse_changes(run, configs.override(run, [f"model.input.features.{change}"]))
    assert configs.from_dict(configs.to_dict(run)) == run


# -- open vocabularies ------------------------------------------------------------------------------------------------

OPEN = {
    "label": {"column": "labels", "rows": 16, "vocabulary": {"name": "open", "buckets": 2}},
    "device": {
        "column": "device",
        "rows": 12,
        "vocabulary": {"name": "open", "buckets": 2, "admit_after": 2, "waiting": 6},
    },
    "age": {"column": "age", "rows": 8, "vocabulary": {"name": "open", "buckets": 1}},
}


def stream(step, lengths=LENGTHS):
    """Devices that come and go: any 64 bits."""
    b, g = asked(lengths, step), generator(step)
    devices = (torch.rand(b.actions, generator=g) ** 2 * 12).long() + step * 2
    labels = lists(b.actions, 9, step)
    labels = replace(labels, values=(labels.values + step) * 2**50)
    return replace(
        b.with_columns(device=(devices + 2**40) * 7919, labels=labels),
        user_columns={"age": torch.randint(-(2**60), 2**60, (len(lengths),), generator=g)},
    )


@pytest.mark.parametrize("table", ["local", "mapped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_row_of_an_id_that_gave_way_starts_as_the_seed_says_without_moments(table, optimizer):
    model = build(features=OPEN, table=table, processes=ALONE, table_std=0.5)
    engine = engine_of(model, OPTIMIZERS[optimizer], processes=ALONE)
    evicted = 0
    for step in range(8):
        before = model.vocabularies["device"].totals()[1]
        share, restarted = model.learn(stream(step), step)
        stays = {name: whole(values) for name, values in engine.tensors().items()}
        engine.restart(restarted)
        now = {name: whole(values) for name, values in engine.tensors().items()}
        rows = restarted["device"]
        evicted += model.vocabularies["device"].totals()[1] - before
        first = model.tables["device"].spec.first_rows(0, 12)
        assert step or len(rows)
        for name, values in now.items():
            expected = stays[name]
            if name.endswith("tables.device.weight") and values.dim():
                expected[rows] = first[rows] if name.startswith("model") else 0
            elif name.endswith(("tables.age.weight", "tables.label.weight")) and values.dim():
                continue
            assert torch.equal(values, expected), name
        parts = [model.supervise(part, 5) for part in share.split(12)]
        train_step(engine, parts, sum(part.count for part in parts), step)
        moved = {name: whole(values) for name, values in engine.tensors().items()}
        assert not torch.equal(moved["model/tables.device.weight"], now["model/tables.device.weight"])
    assert evicted > 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_that_is_being_written_has_rows_as_they_were_before_they_started_anew(optimizer):
    model = build(features=OPEN, table="mapped", processes=ALONE, table_std=0.5)
    engine = engine_of(model, OPTIMIZERS[optimizer], processes=ALONE)
    share, restarted = model.learn(stream(0), 0)
    engine.restart(restarted)
    train_step(engine, [model.supervise(share, 5)])
    were = {name: whole(values) for name, values in engine.tensors().items()}
    taken, aside = snapshot(engine.tensors(), engine.row_optimizers.values(), 1 << 30)
    rows = torch.arange(0, 12, 2)
    engine.restart({"device": rows})
    name = "model/tables.device.weight"
    assert not torch.equal(whole(engine.tensors()[name])[rows], were[name][rows])
    for name, read in [(n, r) for n, t in taken.items() if isinstance(t, Snapshot) for r in t.reads.items()]:
        (start, *_), values = read[0], read[1]()
        assert torch.equal(values, were[name][start : start + len(values)]), name
    aside.end()


def test_evaluation_learns_nothing_and_asks_rows_as_training_left_them():
    model = randomise(build(features=OPEN))
    share, _ = model.learn(stream(0), 0)
    known = {n: v.clone() for n, (_, _, v) in model.vocabularies["device"].state().items()}
    first = model.encode(stream(0))
    assert torch.equal(first, model.encode(share)), "as it was prepared"
    model.encode(stream(5))
    model.supervise(stream(6), 1)
    assert all(torch.equal(known[n], v) for n, (_, _, v) in model.vocabularies["device"].state().items())
    assert torch.equal(first, model.encode(stream(0)))
    # ids that nobody has seen share their bucket's row
    b, new = stream(0, (4,)), torch.full((4,), 10**12)
    (row,) = model.prepare(b.with_columns(device=new)).columns[":device"].unique().tolist()
    assert row in (0, 6)


def test_any_ids_need_a_vocabulary_and_a_vocabulary_rows():
    assert build(features={"city": {"column": "city", "rows": 512, "vocabulary": "open"}}).vocabularies
    assert build(features={"name": {"catalogue": "name", "rows": 512, "vocabulary": "open"}}).vocabularies
    for wrong in ({"column": "device"}, {"derived": "user", "rows": 512}):
        with pytest.raises(UserError, match="a vocabulary is for the ids of a column"):
            section(features={"x": {**wrong, "vocabulary": "open"}})
    with pytest.raises(UserError, match="rows is 100, and 256 buckets"):
        build(features={"x": {"column": "device", "rows": 100, "vocabulary": "open"}})
