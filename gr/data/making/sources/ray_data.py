"""``ray``: a Ray Data dataset of actions: whatever Ray reads."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

from gr.data.cluster import joined
from gr.data.dataset import SequenceDataset
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import name_of
from gr.data.making.prepare import prepare
from gr.data.making.ray_blocks import BlocksReader, making
from gr.data.making.sources.base import QUIET
from gr.data.making.sources.log import ActionLog
from gr.data.writing import check_output
from gr.errors import UserError, first_line, nearest
from gr.progress import Progress

PARTITIONS = 256
"""How many rows a dataset has is known when they have all been made: 256 MiB each are enough for some 500 million."""


class RayData(ActionLog):
    """``--dataset module:function``: the function takes nothing and returns a ``ray.data.Dataset``, a row an action,
    with the columns that the schema maps.

    Ties in time keep the dataset's own order: that of its blocks, which Ray is told to preserve, and of the rows in
    them.  The result is reproducible where the function gives the same rows in the same order.
    """

    name = "ray"

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        if source is None:
            raise UserError("a Ray Data dataset is made by a function: give --dataset module:function")
        options = self.options
        if options.partitions is None:
            options = options.model_copy(update={"partitions": PARTITIONS})
        check_output(out, overwrite)
        function = _function(source)
        with joined(engine.address):
            reader = BlocksReader(source, _dataset(source, function), options)
            return prepare(
                reader,
                out,
                name_of(out),
                options,
                described=self._described(progress),
                described_users=self._described_users(progress),
                overwrite=overwrite,
                progress=progress,
                provenance={"source": source, "options": self.options.model_dump(mode="json")},
                engine=engine,
            )


def _function(source: str) -> Any:
    """The function that ``module:function`` names, from where Python finds modules or from the working folder."""
    module, colon, name = source.partition(":")
    if not (module and colon and name):
        raise UserError(f"the dataset '{source}' is not of the form module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise UserError(f"module '{module}' needs the package '{error.name}': install it") from None
        raise UserError(
            f"there is no module '{module}' for the dataset '{source}': run it where it lies, or set PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"module '{module}' of the dataset '{source}' can't be imported ({type(error).__name__}: "
            f"{first_line(error)}): correct it"
        ) from None
    if not hasattr(found, name):
        names = [n for n, value in vars(found).items() if callable(value)]
        raise UserError(f"module '{module}' has no function '{name}': {nearest(name, names)}")
    function = getattr(found, name)
    if not callable(function):
        raise UserError(f"'{source}' is of type {type(function).__name__}, no function: name one")
    return function


def _dataset(source: str, function: Any) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with making(source):
        dataset = function()
    if not isinstance(dataset, ray.data.Dataset):
        raise UserError(
            f"'{source}' gave {type(dataset).__name__}, not a ray.data.Dataset: return the dataset"
        )
    return dataset
