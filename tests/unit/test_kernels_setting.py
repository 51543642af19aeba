"""train.kernels: what can't be had is refused in one sentence, and the setting reaches the operators."""

import contextlib
from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.train.numerics import numerics
from gr_kernels import hstu_attention
from gr_kernels.dispatch import preferred

CONFIG = Path(__file__).resolve().parents[2] / "configs/ml-1m/hstu.yaml"


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_gpu_kernels_on_a_cpu_are_refused(kernels):
    config = configs.load(CONFIG, [f"train.kernels={kernels}"])
    with pytest.raises(UserError, match=f"train.kernels is {kernels}, which needs an NVIDIA GPU") as refusal:
        with numerics(config, torch.device("cpu")):
            raise AssertionError("the run went on")
    assert refusal.value.everywhere, "every process sees the same"


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_gpu_kernels_on_a_gpu_are_not(kernels, monkeypatch):
    if not torch.cuda.is_available():  # the generator of a GPU that isn't there has no state to keep
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    with numerics(configs.load(CONFIG, [f"train.kernels={kernels}"]), torch.device("cuda", 0)):
        assert preferred() == kernels


def test_an_operators_refusal_is_a_user_error():
    config = configs.load(CONFIG, ["train.kernels=cpp"])
    x = torch.randn(3, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"train.kernels is cpp, and hstu_attention: .*can't run here.*: use auto$"
    ):
        with numerics(config, torch.device("cpu")):
            hstu_attention(x, x, x, torch.tensor([0, 3]), max_length=3, divisor=3.0)
    assert preferred() == "auto"


def test_the_setting_holds_for_the_run_alone():
    with numerics(configs.load(CONFIG, ["train.kernels=reference"]), torch.device("cpu")):
        assert preferred() == "reference"
    assert preferred() == "auto"
