"""train.kernels: what can't be had is refused in one sentence."""

from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.train.kernels import advice_on_kernels, check_kernels
from gr_kernels import hstu_attention
from gr_kernels.dispatch import known_or_auto
from gr_kernels.hstu_attention.op import IMPLEMENTATIONS

CONFIG = Path(__file__).resolve().parents[2] / "configs/ml-1m/hstu.yaml"


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_gpu_kernels_on_a_cpu_are_refused(kernels):
    config = configs.load(CONFIG, [f"train.kernels={kernels}"])
    with pytest.raises(UserError, match=f"train.kernels is {kernels}, which needs an NVIDIA GPU"):
        check_kernels(config, torch.device("cpu"))
    check_kernels(config, torch.device("cuda"))


def test_an_operators_refusal_is_a_user_error():
    config = configs.load(CONFIG, ["train.kernels=cpp"])
    x = torch.randn(3, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"train.kernels is cpp, and hstu_attention: .*can't run here.*: use auto$"
    ):
        with advice_on_kernels(config):
            hstu_attention(
                x, x, x, torch.tensor([0, 3]), max_length=3, divisor=3.0, implementation=config.train.kernels
            )


def test_an_operator_without_that_implementation_chooses():
    assert known_or_auto("cpp", IMPLEMENTATIONS) == "cpp"
    assert known_or_auto("no such", IMPLEMENTATIONS) == "auto"
