"""Vectors of items by an encoder that nothing trains, as a file: what ``model.item_tower`` reads as mode ``cached``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gr.config import read_yaml, validate
from gr.data.dataset import SequenceDataset
from gr.data.outputs import ROWS_PER_GROUP, beside, output_file, parquet_rows
from gr.errors import UserError
from gr.modality.image_reader import ImageReader, ImageSection
from gr.modality.reader import Reader, TextReader, TextSection
from gr.modality.vectors import as_table
from gr.processes import Processes
from gr.shipped import find_config
from gr.train.item_files import read_items


def read_tower(path: str) -> TextSection | ImageSection:
    """The encoder that a YAML file describes, or one of that name that comes with gr (``towers/minilm``): of pictures
    where it says which ``images``, else of text."""
    said = read_yaml(find_config(path))
    if "encoder" not in said:
        raise UserError(
            f"'{path}' names no encoder: write what stands under text, or image, of a run's model.item_tower "
            "(towers/minilm is such a file)"
        )
    return validate(ImageSection if "images" in said else TextSection, said, "")


def encode(
    dataset: str,
    section: TextSection | ImageSection,
    out: str | None,
    processes: Processes,
    items: str | None = None,
) -> tuple[str, int, int]:
    """Write item_id, vector of a dataset's catalogue, or of the ``items`` of a Parquet file with item_id and the
    columns that the encoder reads; the file (``vectors.parquet`` in the dataset's folder, where none is given), how
    many, and their width.  Every process of several calls this and encodes a part."""
    opened = SequenceDataset(dataset)
    reader: Reader
    if isinstance(section, ImageSection):
        reader = ImageReader(section, processes)
    else:
        reader = TextReader(section, processes)
    if items is None:
        if out is None and opened.folder.local is None:
            raise UserError(f"'{dataset}' is in a store: say with --out which file to write")
        target = out if out is not None else str(Path(opened.folder.path, "vectors.parquet"))
        ids, encoded = opened.catalogue.ids, partial(reader.shares, opened.catalogue)
    else:
        target = out if out is not None else beside(items, ".vectors.parquet")
        table = read_items(items)
        ids = table["item_id"].combine_chunks()
        encoded = partial(reader.shares_of, table)
    processes.together(lambda: output_file(target) if processes.is_main else None)
    found = encoded().collected()
    if processes.is_main:
        with parquet_rows(target) as write:
            for start in range(0, len(ids), ROWS_PER_GROUP):
                write(as_table(ids[start : start + ROWS_PER_GROUP], found[start : start + ROWS_PER_GROUP]))
    return target, len(ids), found.shape[1]
