"""Optimisers of rows do the maths that their names promise: which rows move, and by how much.

Shapes: I rows, D columns, U rows seen in a step.
"""

import pytest
import torch

from gr.embeddings import row_updates
from gr.embeddings.row_updates import Piece, RowOptimizer, SparseGradient
from gr.train.optimizers import SGD, AdamW, LazyAdam, RowwiseAdagrad
from tests.precision import tolerance
from tests.unit.models_common import generator

ROWS, DIM, LR = 7, 3, 0.1
SEEN = ([0, 2, 5], [2], [], [2, 5, 6], [0, 2])  # rows by step; 1, 3 and 4 never


def steps():
    """(rows, their gradients) by step."""
    g = generator(3)
    return [
        (torch.tensor(rows, dtype=torch.int64), torch.randn(len(rows), DIM, generator=g)) for rows in SEEN
    ]


def moved(optimizer, factor=None):
    """First values, the values after all steps, and the moments."""
    config = optimizer.config
    first_ID = torch.randn(ROWS, DIM, generator=generator(4))
    piece = Piece("weight", 0, 0, first_ID.clone())
    groups = [{"names": ["tables.items.weight"], "lr": config.lr, "weight_decay": config.weight_decay}]
    zeros = lambda piece, name, columns: torch.zeros(ROWS, columns)  # noqa: E731
    rows = RowOptimizer("items", [piece], optimizer.of_rows(), groups, zeros)
    for rows_U, values_UD in steps():
        rows.step([SparseGradient(rows_U, values_UD, factor)])
    return first_ID.double(), piece.values_RC, rows.moments[0]


def close(found, expected):
    # five steps of a dozen operations each, of values and moments below 4
    torch.testing.assert_close(found.double(), expected, **tolerance(12, stages=5, size=4.0))


def expected_adam(first_ID, config, all_rows):
    """AdamW in float64: of all rows, or of those seen, which count the table's steps."""
    w, m, v = first_ID.clone(), torch.zeros(ROWS, DIM).double(), torch.zeros(ROWS, DIM).double()
    beta1, beta2 = config.betas
    for step, (rows_U, values_UD) in enumerate(steps(), 1):
        gradient = torch.zeros(ROWS, DIM).double()
        gradient[rows_U] = values_UD.double()
        for row in range(ROWS) if all_rows else rows_U.tolist():
            w[row] *= 1 - config.lr * config.weight_decay
            m[row] = beta1 * m[row] + (1 - beta1) * gradient[row]
            v[row] = beta2 * v[row] + (1 - beta2) * gradient[row] ** 2
            root = (v[row] / (1 - beta2**step)).sqrt() + config.eps
            w[row] -= config.lr * (m[row] / (1 - beta1**step)) / root
    return w, m, v


@pytest.mark.parametrize("chunk", [DIM, 2 * DIM, 1 << 22], ids=["row by row", "two rows", "all at once"])
@pytest.mark.parametrize("kind", [AdamW, LazyAdam])
def test_adam_of_all_rows_and_of_those_seen(monkeypatch, kind, chunk):
    monkeypatch.setattr(row_updates, "CHUNK_NUMBERS", chunk)
    # an eps as large as a gradient: where it stands shows
    config = kind.Config(lr=LR, betas=[0.8, 0.9], eps=0.5, weight_decay=0.2)
    first_ID, found_ID, moments = moved(kind(config))
    w, m, v = expected_adam(first_ID, config, all_rows=kind is AdamW)
    close(found_ID, w)
    close(moments["exp_avg"], m)
    close(moments["exp_avg_sq"], v)
    still = (found_ID == first_ID).all(1).nonzero()[:, 0].tolist()
    assert still == ([] if kind is AdamW else [1, 3, 4])


def test_rowwise_adagrad_keeps_one_number_a_row():
    config = RowwiseAdagrad.Config(lr=LR, table_eps=0.5, weight_decay=0.2)
    first_ID, found_ID, moments = moved(RowwiseAdagrad(config))
    w, h = first_ID.clone(), torch.zeros(ROWS, 1).double()
    for rows_U, values_UD in steps():
        for row, gradient in zip(rows_U.tolist(), values_UD.double(), strict=True):
            gradient = gradient + 0.2 * w[row]
            h[row] += (gradient**2).mean()
            w[row] -= LR * gradient / (h[row].sqrt() + 0.5)
    close(found_ID, w)
    close(moments["sum"], h)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_descent_is_torchs(momentum, weight_decay):
    """Plain, of the rows seen; with momentum or decay, of all."""
    config = SGD.Config(lr=LR, momentum=momentum, weight_decay=weight_decay)
    first_ID, found_ID, _ = moved(SGD(config))
    parameter = torch.nn.Parameter(first_ID.clone())
    optimizer = torch.optim.SGD([parameter], lr=LR, momentum=momentum, weight_decay=weight_decay)
    for rows_U, values_UD in steps():
        parameter.grad = torch.zeros_like(parameter).index_copy(0, rows_U, values_UD.double())
        optimizer.step()
    close(found_ID, parameter.detach())


@pytest.mark.parametrize("kind", [AdamW, LazyAdam])
def test_clipped_gradients_are_scaled_whichever_way_rows_move(kind):
    config = kind.Config(lr=LR, eps=0.5)
    scaled = moved(kind(config), factor=torch.tensor(0.25))
    assert not torch.equal(scaled[1], moved(kind(config))[1])
    # m / (sqrt(v) + eps) of a quarter of the gradients is that of all of them with four times the eps
    larger = kind.Config(lr=LR, eps=4 * 0.5)
    close(scaled[1], moved(kind(larger))[1].double())
