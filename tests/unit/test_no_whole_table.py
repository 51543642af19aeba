"""Nothing of a table's size is made outside of the table: neither in a step nor when the catalogue is searched."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gr.embeddings import row_updates, table as table_module
from gr.models.step import StepContext
from gr.train.optimizers import AdamW
from tests.packages import needs
from tests.unit.models_common import batch, engine_of, retrieval, run_config

ITEMS, DIM = 4096, 8
ROOT = Path(__file__).resolve().parents[2]


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made, views of older memory left out."""

    def __init__(self):
        super().__init__()
        self.known, self.most, self.by = set(), 0, ""

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        for tensor in torch.utils._pytree.tree_leaves((arguments, settings)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                self.known.add(tensor.untyped_storage().data_ptr())
        result = operator(*arguments, **(settings or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_sparse:
                new = tensor.untyped_storage().data_ptr() not in self.known
                if new and tensor.numel() > self.most:
                    self.most, self.by = tensor.numel(), str(operator)
        return result


def model_of(table):
    encoder = {"name": "hstu", "layers": 1, "heads": 1, "qk_dim": 4, "v_dim": 4, "dropout": 0.0}
    model = {"table": table, "input": {"dropout": 0.0}}
    return retrieval(
        run_config(encoder, {"name": "sampled_softmax", "negatives": 9}, dim=DIM, model=model), ITEMS
    )


def step_and_search(table, monkeypatch) -> Largest:
    """A training step, then ranks and best items, in chunks of an eighth of the rows."""
    monkeypatch.setattr(table_module, "MAX_SCORES", 6 * ITEMS // 8)
    monkeypatch.setattr(row_updates, "CHUNK_NUMBERS", ITEMS * DIM // 8)
    model = model_of(table)
    engine = engine_of(model, AdamW(AdamW.Config(lr=0.01)), 1.0)
    asked = batch(items=ITEMS)
    with Largest() as seen:
        parts = [model.supervise(part, 3) for part in asked.split(9)]
        engine.forward_backward(parts, StepContext(5), 20)
        engine.step(1.0)
        model.standing(asked, torch.arange(asked.sequences))
        model.topk(asked, 5)
    return seen


@pytest.mark.parametrize("table", ["mapped", "torchrec"])
def test_a_step_and_a_search_make_nothing_of_the_tables_size(table, monkeypatch):
    if table == "torchrec":
        needs("torchrec")
    seen = step_and_search(table, monkeypatch)
    assert 0 < seen.most <= ITEMS * DIM // 4, f"{seen.by} made {seen.most} numbers"


def test_the_watch_sees_a_whole_table(monkeypatch):
    """A local table has a gradient of its size."""
    assert step_and_search("local", monkeypatch).most >= ITEMS * DIM


def test_nobody_outside_of_the_tables_reads_their_memory():
    """What a table owns (``weight_ID``, ``bias_I``, ``pieces``, first rows) is named in gr/embeddings, and where an
    engine moves and saves it."""
    owned = {"weight_ID", "bias_I", "first_rows", "values_RC", "pieces"}
    allowed = {"gr/train/engines/engine.py"}
    found = []
    for file in (
        f for part in ("models", "eval", "train") for f in sorted((ROOT / "gr" / part).rglob("*.py"))
    ):
        name = file.relative_to(ROOT).as_posix()
        if name in allowed:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in owned:
                found.append(f"{name}:{node.lineno} {node.attr}")
    assert not found, found
