"""The configs that come with gr, by name: ``ml-1m/hstu``, ``quickstart``.

They are package data.  A wheel holds the files themselves; in a checkout ``gr/configs`` is a link to the folder
``configs`` beside the package, so that an installed gr and a checkout find them in the same way.
"""

from __future__ import annotations

from pathlib import Path

from gr.errors import UserError, nearest

FOLDER = Path(__file__).with_name("configs")
TABLE = "table.yaml"
"""A published table, one a dataset; not a run's config."""
SWEEPS = "scaling"
"""The folder of sweeps, files of another kind as well."""


def shipped_names() -> list[str]:
    """Names of the configs, as ``find_config`` takes them."""
    files = (f.relative_to(FOLDER) for f in FOLDER.glob("**/*.yaml") if f.name != TABLE)
    return sorted(f.with_suffix("").as_posix() for f in files if f.parts[0] != SWEEPS)


def sweep_names() -> list[str]:
    """Names of the sweeps, as ``find_sweep`` takes them."""
    return sorted(f"{SWEEPS}/{f.stem}" for f in (FOLDER / SWEEPS).glob("*.yaml"))


def find_sweep(name: str | Path) -> Path:
    """The file ``name`` or, where there is none, the sweep of that name that comes with gr: ``scaling/small``."""
    if Path(name).is_file():
        return Path(name)
    key = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if key not in sweep_names():
        raise UserError(
            f"no sweep file '{name}', and none of that name comes with gr: {nearest(key, sweep_names())}"
        )
    return FOLDER / f"{key}.yaml"


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file ``name`` (relative to the folder ``beside``, the current one without it) or, where there is none, the
    config of that name that comes with gr: ``ml-1m/hstu``, or as the README writes it, ``configs/ml-1m/hstu.yaml``.

    Raises UserError with the nearest names where there is neither."""
    file = (beside or Path()) / name
    if not file.is_file():
        key = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
        if key in shipped_names():
            return FOLDER / f"{key}.yaml"
        if not file.exists():
            raise UserError(
                f"no config file '{name}', and none of that name comes with gr: {nearest(key, shipped_names())}"
            )
    return file


def table_names() -> list[str]:
    """Datasets with a published table."""
    return sorted(f.parent.name for f in FOLDER.glob(f"*/{TABLE}"))


def find_table(dataset: str) -> Path:
    """The file of a dataset's published table."""
    if dataset not in table_names():
        raise UserError(f"no published table for '{dataset}': {nearest(dataset, table_names())}")
    return FOLDER / dataset / TABLE
