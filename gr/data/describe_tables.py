"""Tables that show a description of a sequence dataset on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gr.data.dataset import SequenceDataset
from gr.data.describe import Description, samples, titles
from gr.data.making.times import when

BAR = 40


def _line(text: str) -> Text:
    """A line stays a line: what is too long for the terminal is cut."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def preparation_tables(dataset: SequenceDataset) -> list[Table]:
    """What each stage of preparing left and why rows were put aside, as the manifest remembers it; a generated dataset
    has neither."""
    provenance, tables = dataset.manifest.provenance, []
    if stages := provenance.get("stages"):
        title = escape(f"{dataset.manifest.name} -> {dataset.path}")
        table = Table("left after", title=title, title_justify="left")
        for column in ("actions", "users", "items"):
            table.add_column(column, justify="right")
        for stage in stages:
            counts = (stage[c] for c in ("actions", "users", "items"))
            table.add_row(stage["stage"], *("" if n is None else f"{n:,}" for n in counts))
        tables.append(table)
    if reasons := provenance.get("quarantined"):
        title = escape(f"{dataset.path}/quarantine{'*' if provenance.get('appended') else ''}")
        table = Table("quarantined because", title=title, title_justify="left")
        table.add_column("rows", justify="right")
        for reason, count in reasons.items():
            table.add_row(escape(reason), f"{count:,}")
        tables.append(table)
    return [*tables, *remarks_tables(dataset)]


def remarks_tables(dataset: SequenceDataset) -> list[Table]:
    """What preparing took for granted, and what it doubts; none where it had no reason to speak."""
    provenance = dataset.manifest.provenance
    table = Table("", "how the log was read", title_justify="left")
    for kind, key in (("assumed", "assumptions"), ("[yellow]doubt", "doubts")):
        logs = [provenance, *provenance.get("appended", [])]
        for sentence in dict.fromkeys(said for log in logs for said in log.get(key, [])):
            table.add_row(kind, escape(sentence))
    if capped := provenance.get("capped"):
        said = f"{capped['actions']:,} earlier actions of {capped['users']:,} users are left out (max_user_actions)"
        table.add_row("capped", said)
    return [table] if table.row_count else []


def counts_table(dataset: SequenceDataset, found: Description) -> Table:
    manifest = dataset.manifest
    table = Table(title=escape(f"{manifest.name} ({dataset.path})"), show_header=False, title_justify="left")
    table.add_row(manifest.rows_are, f"{dataset.users:,}")
    table.add_row("items", f"{dataset.items:,}")
    if manifest.rows_are == "users":
        table.add_row("actions", f"{dataset.actions:,}")
        table.add_row("density", f"{100 * dataset.actions / (dataset.users * dataset.items):.3g} %")
        quantiles = found.length_quantiles((0, 0.25, 0.5, 0.75, 0.95, 1))
        table.add_row("length at 0/25/50/75/95/100 %", ", ".join(f"{q:,}" for q in quantiles))
    top = f"{found.share_of_top(0.01):.1%}, {found.share_of_top(0.1):.1%}"
    table.add_row("share of the top 1 %, 10 % items", top)
    if found.first_time is not None and found.last_time is not None:
        first, last = (when(time) for time in (found.first_time, found.last_time))
        doubt = f"\n[yellow]{said}" if (said := found.unit_doubt()) else ""
        table.add_row("times (UTC)", f"{first} to\n{last}{doubt}")
    known = [c for c in dataset.catalogue.column_names if c not in ("item_id", "count")]
    for of in ("actions", "users"):
        named = ", ".join(f"{c.name} ({c.type})" for c in manifest.columns if c.of == of)
        table.add_row(f"columns of the {manifest.rows_are if of == 'users' else of}", escape(named))
    table.add_row("columns of the catalogue", escape(", ".join(known) or "none"))
    if manifest.action_type_names:
        table.add_row("action types", escape(", ".join(manifest.action_type_names[:20])))
    table.add_row("blocks", f"{len(manifest.blocks):,} of {manifest.block_rows:,} {manifest.rows_are}")
    table.add_row("fingerprint (sequences)", manifest.fingerprint)
    table.add_row("generation (and raw item ids)", manifest.generation)
    return table


def lengths_table(dataset: SequenceDataset, found: Description) -> Table:
    bins = found.length_histogram()
    table = Table("length", "", title="sequences by length", title_justify="left")
    table.add_column(dataset.manifest.rows_are, justify="right")
    most = max(users for _, _, users in bins)
    for low, high, users in bins:
        table.add_row(
            f"{low}" if low == high else f"{low:,} - {high:,}", "█" * -(-users * BAR // most), f"{users:,}"
        )
    return table


def popularity_table(dataset: SequenceDataset, found: Description) -> Table:
    table = Table(title="most popular items", title_justify="left")
    table.add_column("item")
    table.add_column("actions", justify="right", no_wrap=True)
    table.add_column("of all", justify="right", no_wrap=True)
    rows = found.popular()
    for row, title in zip(rows, titles(dataset, rows)):
        count = int(found.counts_I[row])
        table.add_row(_line(title), f"{count:,}", f"{count / dataset.actions:.2%}")
    return table


def health_table(dataset: SequenceDataset, found: Description) -> Table:
    h = found.health
    table = Table("check", title="health", title_justify="left")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("meaning")
    checks = [
        ("sequences of 0 actions", h.empty, dataset.users, "must be none"),
        (
            "items never acted on",
            h.unseen_items,
            dataset.items,
            "listed only: can be recommended, never learned",
        ),
        ("actions on unknown rows", h.out_of_range, dataset.actions, "must be none"),
        ("items whose count is wrong", h.miscounted_items, dataset.items, "must be none"),
    ]
    if dataset.manifest.rows_are == "users":
        checks += [
            ("sequences of 1 action", h.single, dataset.users, "nothing to predict from"),
            (
                "sequences of 2 actions",
                h.short,
                dataset.users,
                "no training target once one is held out for the test",
            ),
            (
                "actions on an item the user had before",
                h.repeated_items,
                dataset.actions,
                "excluding history hides these",
            ),
        ]
    if dataset.has_timestamps:
        checks += [
            ("users whose times go back", h.unsorted, dataset.users, "must be none"),
            ("actions before 1980", h.early, dataset.actions, "the others are later: another unit?"),
            ("actions at time 0 or -1", h.epoch, dataset.actions, "often an unknown time: set unknown_times"),
            ("neighbours at the same time", h.ties, h.pairs, "their order is the log's own"),
            ("users whose last two tie", h.last_ties, dataset.users, "their test item hangs on that order"),
            ("repeats of (item, time)", h.repeats, dataset.actions, "duplicates=drop_exact removes them"),
        ]
    for name, count, total, meaning in checks:
        broken = meaning == "must be none" and count
        share = f"{count / total:.1%}" if total else ""
        table.add_row(
            name, f"{count:,}", share, "[bold red]broken: prepare the dataset again" if broken else meaning
        )
    return table


def samples_table(dataset: SequenceDataset, users: int, actions: int) -> Table:
    table = Table(title="samples", title_justify="left", show_lines=True)
    table.add_column(dataset.manifest.rows_are.removesuffix("s"), no_wrap=True)
    table.add_column("actions", justify="right", no_wrap=True)
    table.add_column(f"the last {actions}")
    rows = samples(dataset, users)
    for n in range(len(rows)):
        start, stop = int(rows.offsets_R1[n]), int(rows.offsets_R1[n + 1])
        first = max(stop - actions, start)
        shown = titles(dataset, rows.items_A[first:stop].tolist())
        if rows.timestamps_A is not None:
            shown = [f"{when(int(t))}  {title}" for t, title in zip(rows.timestamps_A[first:stop], shown)]
        table.add_row(escape(str(rows.users_R[n])), f"{stop - start:,}", _line("\n".join(shown)))
    return table
