"""Labels of actions: thresholds, sets, names of action types, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gr import config as configs
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.labels import Labels, LabelTask

COLUMNS = [
    ColumnInfo("item", "int32"),
    ColumnInfo("type", "int32"),
    ColumnInfo("value", "float32"),
    ColumnInfo("time", "int64"),
    ColumnInfo("seconds", "int64"),
    ColumnInfo("shop", "string"),
    ColumnInfo("tags", "int64", multi=True),
    ColumnInfo("user_id", "int64", of="users"),
]
DATASET = SimpleNamespace(columns=COLUMNS, action_type_names=["buy", "view", "3"])


def labels(**tasks):
    return Labels({name: LabelTask.model_validate(task) for name, task in tasks.items()}, DATASET)


def of(task, **columns):
    return labels(task=task).of(columns)[:, 0]


def test_a_threshold_is_met_by_equality_and_a_missing_value_is_unknown():
    found = of({"column": "value", "at_least": 4}, value=torch.tensor([3.9, 4.0, 5.0, torch.nan, -torch.inf]))
    assert found[:3].tolist() == [0, 1, 1] and found[3].isnan() and found[4] == 0
    assert found.dtype == torch.float32


def test_a_threshold_is_rounded_as_the_values_are():
    assert float(np.float32(4.1)) < 4.1, "else this test shows nothing"
    assert of({"column": "value", "at_least": 4.1}, value=torch.tensor([4.1])).tolist() == [1]
    assert of({"column": "value", "any_of": [4.1]}, value=torch.tensor([4.1, 4.2])).tolist() == [1, 0]


def test_integers_keep_their_digits():
    large = 2**53 - 1
    seconds = torch.tensor([large - 1, large, 3, 2])
    assert of({"column": "seconds", "at_least": float(large)}, seconds=seconds).tolist() == [0, 1, 0, 0]
    assert of({"column": "seconds", "at_least": 2.5}, seconds=seconds).tolist() == [1, 1, 1, 0]
    assert of({"column": "seconds", "any_of": [large, 2.0]}, seconds=seconds).tolist() == [0, 1, 0, 1]


def test_a_label_that_is_1_or_is_not_is_0_or_1_or_unknown():
    one, other = {"column": "value", "any_of": [1]}, {"column": "seconds", "any_of": [1]}
    good = {"value": torch.tensor([0, 1, torch.nan]), "seconds": torch.tensor([0, 1, 1])}
    labels(one=one, other=other).check(good)
    for column, value in (("value", 0.5), ("seconds", 2), ("seconds", -1)):
        bad = {**good, column: torch.tensor([0, value, 1])}
        with pytest.raises(UserError, match=rf"column '{column}' holds {value:g}, and a label .* is 0 or 1"):
            labels(one=one, other=other).check(bad)
    labels(one={"column": "seconds", "any_of": [1, 2]}).check({"seconds": torch.tensor([5])})
    labels(one={"column": "value", "at_least": 1}).check({"value": torch.tensor([5.0])})


def test_action_types_go_by_their_names():
    types = torch.tensor([0, 1, 2, 1])
    assert of({"column": "type", "any_of": ["view"]}, type=types).tolist() == [0, 1, 0, 1]
    assert of({"column": "type", "any_of": ["buy", 3]}, type=types).tolist() == [1, 0, 1, 0]


def test_tasks_stand_in_the_order_of_the_config():
    found = labels(b={"column": "value", "at_least": 1}, a={"column": "type", "any_of": ["buy"]})
    assert found.names == ["b", "a"] and found.columns == {"value", "type"}
    table = found.of({"value": torch.tensor([2.0, 0.0]), "type": torch.tensor([1, 0])})
    assert table.tolist() == [[1, 0], [0, 1]]
    assert found.of({"value": torch.empty(0), "type": torch.empty(0, dtype=torch.int64)}).shape == (0, 2)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"column": "valu", "at_least": 4}, r"'model.tasks.task.column' is 'valu'.*did you mean 'value'"),
        ({"column": "user_id", "at_least": 4}, "no column of the dataset's actions"),
        ({"column": "item", "any_of": [4]}, "'item', which a prediction is given"),
        ({"column": "time", "at_least": 4}, "'time', which a prediction is given"),
        ({"column": "shop", "any_of": ["a"]}, "'shop', and that column is text"),
        ({"column": "tags", "any_of": [1]}, "'tags', and that column holds lists"),
        ({"column": "type", "any_of": ["veiw"]}, "'veiw', which is no action type.*did you mean 'view'"),
        ({"column": "type", "at_least": 1}, "action types have no order.*known: 3, buy, view"),
        ({"column": "value", "any_of": ["four"]}, "'four', and column 'value' holds numbers"),
        ({"column": "seconds", "any_of": [1.5]}, "has 1.5, and column 'seconds' holds integers"),
    ],
)
def test_what_does_not_fit_the_dataset_is_one_sentence(task, sentence):
    with pytest.raises(UserError, match=sentence):
        labels(task=task)


BASE = {
    "data": {"path": "none"},
    "optimizer": "adamw",
    "model": {"name": "ranking", "encoder": "hstu", "tasks": {"like": {"column": "value", "at_least": 4}}},
}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.tasks.buy={column: value}", "'model.tasks.buy' .*either at_least, a number, or any_of"),
        ("model.tasks.like.any_of=[1]", "'model.tasks.like' .*either at_least, a number, or any_of"),
        ("model.tasks.like={column: value, any_of: []}", "'model.tasks.like.any_of'"),
        ("model.tasks.like={column: value, any_of: [1, 1]}", "stands in it twice"),
        (
            "model.tasks.like.at_leat=3",
            "unknown config key 'model.tasks.like.at_leat': did you mean 'at_least'",
        ),
        ("model.tasks.like.at_least=four", "'model.tasks.like.at_least' is 'four'"),
        ("model.tasks.like.at_least=true", "'model.tasks.like.at_least'"),
        ("model.tasks={a/b: {column: value, at_least: 1}}", "letters, digits"),
        ("model.tasks.item_ids={column: value, at_least: 1}", "'item_ids' is another column of the files"),
        ("model.tasks.like.weight=0", "'model.tasks.like.weight' is 0"),
        ("model.tasks.like.weight=1e308", "'model.tasks.like.weight' is 1e"),
        ("model.hidden=[0]", "'model.hidden.0' is 0"),
    ],
)
def test_what_no_dataset_could_have_is_refused_with_the_config(override, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.from_dict(configs.overridden(BASE, [override], configs.RunConfig))


def test_a_model_without_a_task_is_refused():
    model = {**BASE["model"], "tasks": {}}
    with pytest.raises(UserError, match=r"'model.tasks' is \{\}"):
        configs.from_dict({**BASE, "model": model})


def test_an_override_reaches_into_a_task():
    changed = configs.from_dict(
        configs.overridden(BASE, ["model.tasks.like.at_least=3", "model.tasks.buy={column: type, any_of: [buy]}"],
                           configs.RunConfig)
    )  # fmt: skip
    assert list(changed.model.tasks) == ["like", "buy"] and changed.model.tasks["like"].at_least == 3
    assert configs.from_dict(configs.to_dict(changed)) == changed
