"""Schema files and options: typed, unknown keys refused with the nearest."""

from __future__ import annotations

import pytest
import yaml

from gr.config import read_yaml
from gr.data.making.sources.base import make_source
from gr.errors import UserError

SCHEMA = """
columns:
  user: member
  item: sku
  time: ts
  action_type: event
  fields:
    device: dev
    price: {column: eur, type: float}
time_unit: ms
filter: {min_item_count: 5, mode: core}
"""


def test_schema_file_and_settings(tmp_path):
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    given = read_yaml(tmp_path / "schema.yaml")
    options = make_source("log", given, ["filter.min_length=2", "duplicates=drop_exact"]).options
    assert (options.columns.user, options.columns.fields["price"].type, options.time_unit) == (
        "member",
        "float",
        "ms",
    )
    assert (options.filter.min_item_count, options.filter.mode, options.filter.min_length) == (5, "core", 2)
    assert options.duplicates == "drop_exact"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "unknown config key 'colums': did you mean 'columns'?"),
        (
            {"filter": {"min_items": 3}},
            "unknown config key 'filter.min_items': did you mean 'min_item_count'?",
        ),
        (
            {"time_unit": "seconds"},
            "config key 'time_unit' is 'seconds': input should be 's', 'ms', 'us', 'ns' or 'iso'",
        ),
        ({"chunk_rows": "many"}, "config key 'chunk_rows' is 'many': input should be a valid integer"),
        (
            {"columns": {"user": "u"}},
            "config key 'columns.item' is missing: set it in the file or as columns.item=VALUE",
        ),
        (
            {"csv": {"encoding": "utf8x"}},
            "config key 'csv.encoding' is 'utf8x': value error, no encoding of that name is known: use utf-8, "
            "latin-1, ...",
        ),
        (
            {"csv": {"quote": "''"}},
            "config key 'csv.quote' is \"''\": string should have at most 1 character",
        ),
        (
            {"csv": {"delimiter": "¦"}},
            "config key 'csv.delimiter' is '¦': value error, only ASCII characters can cut CSV",
        ),
    ],
)
def test_wrong_keys_are_refused(change, message):
    with pytest.raises(UserError) as error:
        make_source("log", {**yaml.safe_load(SCHEMA), **change})
    assert str(error.value) == message


def test_published_protocols():
    books = make_source("amazon-books").options.filter
    assert (books.min_item_count, books.min_user_count, books.mode, books.min_length) == (5, 5, "once", 5)
    assert make_source("ml-1m").options.items == make_source("ml-20m").options.items == "listed"
    assert make_source("ml-1m", settings=["items=seen"]).options.items == "seen"
    with pytest.raises(UserError, match="unknown dataset 'ml-2m': did you mean 'ml-"):
        make_source("ml-2m")
