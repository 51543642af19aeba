"""Golden losses: a refactor keeps them; a change of numbers explains itself and renews them.

Renew with GR_RENEW_GOLDEN=1 after showing that the new numbers are right.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.train.job import run
from tests.end_to_end.tiny import make_dataset, write_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
# float32 sums in another order (other vector widths, other BLAS) differ by some 1e-7 of their size; eight steps of
# training carry that on.
TOLERANCE = 2e-5
CLASSIC = ["model.similarity={normalize: false, temperature: 1.0}", "objective=full_softmax"]
VARIANTS = {
    "hstu": [],
    "hstu_softmax_no_bias": [
        "model.encoder.activation=softmax",
        "model.encoder.relative_position=false",
        "model.encoder.relative_time=false",
    ],
    "hstu_shared_popularity_logq": ["objective={shared: true, sampling: popularity, logq: true}"],
    "hstu_in_batch": ["objective={name: in_batch}"],
    "sasrec": ["model.encoder={name: sasrec}", "model.input.positions=truncated_normal"],
    "sasrec_full_softmax": ["model.encoder={name: sasrec, affine_norms: true, final_norm: true}", *CLASSIC],
    "transformer_bpr": ["model.encoder={name: transformer}", "objective={name: bpr}"],
    "gru4rec_bce": ["model.encoder={name: gru4rec, hidden: 12}", "objective={name: bce}"],
    "bert4rec": [
        "model.task={name: cloze}",
        "model.encoder={name: transformer, causal: false, norm: post, input_norm: true}",
        *CLASSIC,
    ],
}
# Dropout comes from torch's generator, whose stream may change between its releases; everything else is ours
COMMON = [
    *("model.input.dropout=0", "model.encoder.dropout=0", "train.max_steps=8", "eval.splits=[test]"),
    *("checkpoint.every_steps=null", "train.kernels=auto"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    make_dataset(path / "data")
    return path


def losses(folder, name):
    base = configs.load(write_config(folder, folder / "data", folder / name))
    config = configs.override(base, VARIANTS[name])
    attention = (
        ["model.encoder.attention_dropout=0"] if hasattr(config.model.encoder, "attention_dropout") else []
    )
    threads = torch.get_num_threads()
    try:
        result = run(configs.override(config, [*COMMON, *attention]))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return [row["loss"] for row in result.metrics if row["kind"] == "train"]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_the_golden_ones(folder, name):
    measured = losses(folder, name)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GR_RENEW_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps({**golden, name: measured}, indent=1) + "\n")
        golden[name] = measured
    assert measured == pytest.approx(golden[name], rel=TOLERANCE)
