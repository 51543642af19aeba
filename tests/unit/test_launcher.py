"""What the variables of a launcher say, and the one sentence where they say half of it."""

import pytest

from gr.errors import UserError
from gr.launcher import Launched, launched

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def without(*names: str, **changed: str) -> dict[str, str]:
    return {k: v for k, v in (WHOLE | changed).items() if k not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launched(0, 1, 0, 1)),
        ({"LOCAL_RANK": "7", "MASTER_ADDR": "elsewhere"}, Launched(0, 1, 0, 1)),
        (WHOLE, Launched(3, 4, 1, 2)),
        (without("LOCAL_RANK", "LOCAL_WORLD_SIZE"), Launched(3, 4, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launched(0, 1, 0, 1)),  # alone: nobody to meet
    ],
)
def test_processes_started_together(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            without("MASTER_ADDR", "MASTER_PORT"),
            "RANK (3) and WORLD_SIZE (4) are set and MASTER_ADDR and MASTER",
        ),
        (without("MASTER_ADDR"), "RANK (3) and WORLD_SIZE (4) are set and MASTER_ADDR is not: "),
        (without(MASTER_PORT=""), "RANK (3) and WORLD_SIZE (4) are set and MASTER_PORT is not: "),
        (without("WORLD_SIZE"), "RANK is set (3) and WORLD_SIZE isn't: "),
        (without("RANK"), "WORLD_SIZE is set (4) and RANK isn't: "),
        (without(RANK="4"), "RANK is 4 and WORLD_SIZE is 4, ranks count from 0: "),
        (without(WORLD_SIZE="two"), "WORLD_SIZE is 'two', not a whole number: "),
        (without(RANK="-1"), "RANK is '-1', not a whole number: "),
        (without(LOCAL_RANK=""), "LOCAL_RANK is '', not a whole number: "),
    ],
)
def test_half_of_it_is_refused(environment, sentence):
    with pytest.raises(UserError) as refusal:
        launched(environment)
    assert str(refusal.value).startswith(sentence)
    assert str(refusal.value).endswith(
        "start with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset them all"
    )
