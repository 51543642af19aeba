"""Where an encoder is: a folder, the files of an installed package, or a name at the Hugging Face hub.

Nothing here runs code that comes with an encoder, and nothing is read from a pickle.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr.errors import UserError, first_line
from gr_kernels.tracing import on_paper_now

log = logging.getLogger(__name__)
PACKAGE = "package:"


def folder_of(encoder: str) -> Path | None:
    """The folder that ``encoder`` names: a path, or ``package:NAME`` for the one folder with a model among the files of
    an installed package (which is not imported); None where it can only be a name at the hub."""
    if encoder.startswith(PACKAGE):
        return _in_package(encoder.removeprefix(PACKAGE))
    path = Path(encoder).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or encoder.startswith((".", "~")) or encoder.count("/") > 1:
        raise UserError(f"no folder '{encoder}' with an encoder: give the path of one, or a name at the hub")
    return None


def _in_package(name: str) -> Path:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    where = None if found is None else next(iter(found.submodule_search_locations or []), None)
    if where is None:
        raise UserError(
            f"the encoder is in the package '{name}', which is not installed: make setup-encoders, or give the path "
            "of a folder"
        )
    models = sorted(
        file.parent for file in Path(where).rglob("config.json") if _weights(file.parent, ".safetensors")
    )
    if len(models) != 1:
        raise UserError(
            f"package '{name}' has {len(models)} folders with a config.json and safetensors, not one: give the path "
            "of a folder"
        )
    return models[0]


def _weights(folder: Path, *endings: str) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.endswith(endings)]


def check_safe(folder: Path, encoder: str) -> None:
    """Refuse a folder that has no config, or whose weights aren't safetensors; a plan reads none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"'{encoder}' has no config.json: give the folder that save_pretrained wrote")
    if on_paper_now() or _weights(folder, ".safetensors"):
        return
    if pickles := _weights(folder, ".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(
            f"the weights of encoder '{encoder}' are a pickle ({pickles[0].name}), which can run code when it is read: "
            "save the encoder again as safetensors (save_pretrained does)"
        )
    raise UserError(f"encoder '{encoder}' has no weights (*.safetensors): give the folder of a whole model")


def loaded(encoder: str, load: Callable[..., Any]) -> Any:
    """``load(source, **settings)`` of transformers, from the folder or from the hub: what was fetched before first."""
    folder = folder_of(encoder)
    if folder is not None:
        check_safe(folder, encoder)
        return _refusing(encoder, lambda: load(str(folder), local_files_only=True))
    try:
        return load(encoder, local_files_only=True)
    except (OSError, ValueError):  # nothing was fetched
        if on_paper_now():
            raise UserError(
                f"encoder '{encoder}' is no folder of this machine and was not fetched before, and a plan fetches "
                "nothing: give the path of a folder with its config.json"
            ) from None
        if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            raise UserError(
                f"encoder '{encoder}' is no folder of this machine, was not fetched before, and HF_HUB_OFFLINE forbids "
                "to ask the hub: give the path of a folder, or fetch it first"
            ) from None
    said = "encoder '%s' is fetched from the hub (where there is no network it gives up after about a minute)"
    log.warning(said, encoder)
    return _refusing(encoder, lambda: load(encoder))


def _refusing(encoder: str, load: Callable[[], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"encoder '{encoder}' comes with code of its own, which is never run: choose one of a kind that "
                "transformers has"
            ) from error
        first = first_line(error).rstrip(":")
        raise UserError(
            f"encoder '{encoder}' can't be loaded ({first}): give the path of a folder that save_pretrained wrote, or "
            "a name that the hub has, with a network"
        ) from error
