"""``lists``: Parquet with a row a user, whose actions are lists, as Spark's collect_list writes them."""

from __future__ import annotations

from gr.data.making.sources.log import ActionLog
from gr.data.making.user_rows import ListReader


class UserLists(ActionLog):
    """The schema is a log's: ``columns.user`` has single values, the others that it maps have lists."""

    name = "lists"
    reader = ListReader
