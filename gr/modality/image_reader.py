"""How pictures of items become vectors: an encoder with what it reads, as a config says it.

Shapes: n items, I items of a catalogue, E width of a vector, S pixels along a side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from gr.config import POSITIVE, Section
from gr.errors import UserError, nearest
from gr.modality.digest import digest
from gr.modality.encoder import Encoder
from gr.modality.picture_files import open_pictures
from gr.modality.pictures import Pictures, Unseen, say_bad, say_missing
from gr.modality.reader import Reader
from gr.modality.surroundings import Described
from gr.modality.texts import as_texts
from gr.processes import Processes
from gr_kernels.tracing import on_paper_now


class ImageSection(Section):
    """How a picture becomes a vector.  encoder: a folder, ``package:NAME`` or a name at the hub (ViT, MAE, Swin,
    ResNet).  images: a folder, a zip or a Parquet file of pictures.  column: of the catalogue, which names an item's
    picture; its item_id without it.  size: pixels along a side.  batch: pictures that the encoder takes at once."""

    encoder: str
    images: str
    pooling: Literal["mean", "cls"] = "cls"
    column: str = "item_id"
    size: POSITIVE = 224
    batch: POSITIVE = 32


class ImageEncoder(Encoder):
    """Any encoder of pictures that transformers' AutoModel loads; its first token (``cls``), the mean over all of its
    tokens, or of a convolutional one the mean over its last map."""

    def forward(self, pixels_n3SS: Tensor) -> Tensor:
        """(n, E) float32."""
        kind = self.config.model_type
        settings: dict[str, Any] = {}
        if kind in ("vit", "vit_mae", "deit"):
            settings["interpolate_pos_encoding"] = True
        if kind == "vit_mae":  # it hides patches by these numbers, and shuffles them even where it hides none
            self.config.mask_ratio = 0.0
            patches = (pixels_n3SS.shape[-1] // self.config.patch_size) ** 2
            settings["noise"] = torch.arange(patches, device=pixels_n3SS.device).expand(len(pixels_n3SS), -1)
        hidden = self.model(pixel_values=pixels_n3SS, **settings).last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean((2, 3)).float()
        if (prompt := getattr(self.model, "prompt", None)) is not None:
            hidden = hidden[:, : -len(prompt.vectors)]
        return (hidden[:, 0] if self.pooling == "cls" else hidden.mean(1)).float()


class ImageReader(Reader):
    """Pictures of items as pixels, and as vectors of an encoder that nothing moves."""

    reads = "pictures"

    def __init__(self, section: ImageSection, processes: Processes) -> None:
        super().__init__(section, processes)
        self.section: ImageSection = section
        self.files = None if on_paper_now() else open_pictures(section.images)
        self._said: set[str] = set()
        self._missing: list[tuple[int, int]] = []
        patch = getattr(self.config, "patch_size", 1)
        if section.size < (least := max(patch) if isinstance(patch, (list, tuple)) else patch):
            raise UserError(
                f"model.item_tower.image.size is {section.size} pixels, and encoder '{section.encoder}' looks at "
                f"patches of {least}: make pictures that large at least"
            )

    def encoder(self, dropout: float = 0.0) -> ImageEncoder:
        made = ImageEncoder(self.section.encoder, self.section.pooling, dropout)
        return made.to(self.processes.device)

    def items_of(self, column: Any, names: Iterable[str], rows: int) -> Pictures:
        assert self.files is not None
        wanted = self.section.column
        if wanted not in names:
            raise UserError(
                f"model.item_tower reads column '{wanted}', which is none of the items': {nearest(wanted, names)}"
            )
        pictures = Pictures(self.files, as_texts(wanted, column(wanted), rows), self.section.size)
        pictures.check(self.section.images, wanted)
        if self.processes.is_main and (missing := (pictures.missing, rows)) not in self._missing:
            say_missing(*missing)
            self._missing.append(missing)
        return pictures

    def items(self, catalogue: Described) -> Pictures:
        return self.items_of(catalogue.column, catalogue.column_names, catalogue.rows)

    def check(self, catalogue: Described) -> None:
        self.items(catalogue)

    def foreseen(self, catalogue: Described) -> Unseen:
        return Unseen(catalogue.rows, self.section.size)

    def items_in(self, items: pa.Table) -> Pictures:
        return self.items_of(items.column, items.column_names, len(items))

    def about(self, items: Any) -> dict[str, Any]:
        """What is kept belongs to these pictures: their names, and what is in them."""
        content = digest("".join(items.digests()))
        return {"names": digest("\n".join(items.names)), "pictures": content, "size": self.section.size}

    def read_of(self, catalogue: Described) -> dict[str, str]:
        """Of some pictures, a store may hold more than anybody wants to read, and by the first process."""

        def read() -> dict[str, str]:
            return {"pictures": self.items(catalogue).sampled()} if self.processes.is_main else {}

        return self.processes.together(read)

    def said(self, items: Any) -> None:
        everybodys: dict[str, str] = {}
        for bad in self.processes.everybodys(items.bad):
            everybodys |= bad
        if self.processes.is_main and everybodys.keys() != self._said:
            say_bad(everybodys)
        self._said = set(everybodys)
