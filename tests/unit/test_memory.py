"""Out of memory ends in advice; anything else passes through."""

from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.train.memory import advice_when_out_of_memory

CONFIG = configs.load(Path(__file__).resolve().parents[2] / "configs/ml-1m/hstu.yaml")


def test_a_failed_allocation_names_the_keys_to_lower():
    with pytest.raises(UserError, match=r"out of memory .*lower train.micro_batch_actions \(now 65536"):
        with advice_when_out_of_memory(CONFIG):
            torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(UserError, match="out of memory"), advice_when_out_of_memory(CONFIG):
        raise MemoryError("no room")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), advice_when_out_of_memory(CONFIG):
        raise RuntimeError("shapes do not fit")
