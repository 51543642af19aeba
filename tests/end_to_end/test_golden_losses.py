"""Golden losses: a refactor keeps them; a change of numbers explains itself and renews them.

Renew with GR_RENEW_GOLDEN=1 after showing that the new numbers are right.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.train.job import run
from gr_kernels import native
from tests.end_to_end.tiny import make_dataset, write_config
from tests.precision import after_steps

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
# In the environment that wrote the file, equal bits.  In any other (vector widths, BLAS, threads), within a bound:
# - Each step rounds what moves the parameters, sums over the rows of a batch (16 users of up to 20 actions), by at most
#   growth(320) u = 4.3e-6 of its size (tests/precision); k steps of it are in the k-th loss, its own forward pass among
#   them.
# - Of a relative change of the parameters, a loss has CONDITION times as much.  Measured: initial parameters times
#   1 + 1e-5 N(0, 1) move the eight losses of these runs by at most 2.0 times 1e-5 of themselves, but for jumps. (A
#   jump is an element of a gradient that passes through zero: Adam's first steps have the gradients' signs. A change
#   of 1e-5 meets one in two of nine runs, rounding of 1e-7 in one of five hundred.)
TERMS, CONDITION = 16 * 20, 2.0
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


def environment() -> dict[str, object]:
    """What decides the bits: the processor and its instructions, the libraries, their settings, the threads."""
    names = ("vendor_id", "cpu family", "model", "stepping")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(reversed([tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]))
    settings = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return {
        "processor": [platform.machine(), *(fields.get(name, "") for name in names)],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "operators": native.available(),
        "settings": {name: os.environ[name] for name in settings if name in os.environ},
        "threads": torch.get_num_threads(),
    }


def losses(folder, name, again=""):
    base = configs.load(write_config(folder, folder / "data", folder / f"{name}{again}"))
    config = configs.override(base, VARIANTS[name])
    more = ["model.encoder.attention_dropout=0"] if hasattr(config.model.encoder, "attention_dropout") else []
    more.append(f"train.threads={torch.get_num_threads()}")
    try:
        result = run(configs.override(config, [*COMMON, *more]))
    finally:
        torch.use_deterministic_algorithms(False)
    return [row["loss"] for row in result.metrics if row["kind"] == "train"]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_the_golden_ones(folder, name):
    measured = losses(folder, name)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"losses": {}}
    here = environment()
    if os.environ.get("GR_RENEW_GOLDEN") == "1":
        golden = {"environment": here, "losses": {**golden["losses"], name: measured}}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    if golden["environment"] == here:
        assert measured == golden["losses"][name], "not the same bits"
    for k, (found, wanted) in enumerate(zip(measured, golden["losses"][name], strict=True), 1):
        assert found == pytest.approx(wanted, rel=after_steps(k, TERMS, CONDITION)), f"step {k}"


@pytest.mark.parametrize("name", ["hstu", "sasrec_full_softmax", "gru4rec_bce"])
def test_two_runs_have_the_same_bits(folder, name):
    assert losses(folder, name, "-first") == losses(folder, name, "-second")
