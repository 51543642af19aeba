"""gr_kernels.counter_random: published vectors, every implementation against every other, independence of the split."""

from __future__ import annotations

import math

import pytest
import torch

from gr_kernels import explain, native
from gr_kernels.counter_random import (
    derive_key,
    philox,
    truncated_normal_rows,
    uniform_floats,
    uniform_integers,
)
from tests.precision import UNIT

NATIVE = pytest.param(
    "cpp", marks=pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
)
IMPLEMENTATIONS = ["reference", NATIVE]
KEY = derive_key(7, "negatives", 12)


def coordinates(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinals beyond 32 bits and positions of some length, fixed."""
    generator = torch.Generator().manual_seed(1)
    ordinals = torch.randint(0, 2**45, (count,), generator=generator)
    return ordinals, torch.randint(0, 2**32, (count,), generator=generator)


# Known-answer vectors of Philox4x32-10 from the authors' Random123 library.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: int, expected: list[int]) -> None:
    words = philox(key, *(torch.tensor([c]) for c in counter))
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_draw_is_the_documented_word(implementation: str) -> None:
    ordinals, positions = coordinates(5)
    drawn = uniform_integers(KEY, ordinals, positions, 11, 2**32, implementation=implementation)
    for t in range(5):
        for draw in range(11):
            counter = [positions[t], draw // 4, ordinals[t] & 0xFFFFFFFF, ordinals[t] >> 32]
            words = philox(KEY, *(torch.as_tensor(c).reshape(1) for c in counter))
            assert int(drawn[t, draw]) == int(words[draw % 4])


@pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
@pytest.mark.parametrize("draws", [0, 1, 3, 4, 7, 64, 130])
@pytest.mark.parametrize("high", [1, 3883, 2**31 - 5, 2**31, 2**32 - 3, 2**32])
def test_implementations_agree_to_the_bit(draws: int, high: int) -> None:
    ordinals, positions = coordinates(77)
    for function in (
        lambda way: uniform_integers(KEY, ordinals, positions, draws, high, implementation=way),
        lambda way: uniform_floats(KEY, ordinals, positions, draws, implementation=way),
        lambda way: truncated_normal_rows(KEY, ordinals, draws, 0.02, implementation=way),
    ):
        assert torch.equal(function("cpp"), function("reference"))
    if high <= 2**31:
        narrow = uniform_integers(KEY, ordinals, positions, draws, high, dtype=torch.int32)
        assert narrow.dtype == torch.int32
        wide = uniform_integers(KEY, ordinals, positions, draws, high, implementation="reference")
        assert torch.equal(narrow.long(), wide)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_split_of_a_batch_changes_nothing(implementation: str) -> None:
    ordinals, positions = coordinates(1001)
    whole = uniform_integers(KEY, ordinals, positions, 13, 1000, implementation=implementation)
    order = torch.randperm(1001, generator=torch.Generator().manual_seed(2))
    for part in order.split([1, 500, 0, 400, 100]):
        drawn = uniform_integers(
            KEY, ordinals[part], positions[part], 13, 1000, implementation=implementation
        )
        assert torch.equal(drawn, whole[part])
    # fewer draws are the first ones
    assert torch.equal(uniform_integers(KEY, ordinals, positions, 6, 1000), whole[:, :6])
    table = truncated_normal_rows(KEY, range(300), 17, 0.5, implementation=implementation)
    odd = truncated_normal_rows(KEY, range(1, 300, 2), 17, 0.5, implementation=implementation)
    assert torch.equal(odd, table[1::2])
    assert torch.equal(truncated_normal_rows(KEY, torch.tensor([299, 4]), 9, 0.5), table[[299, 4], :9])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integers_are_uniform(implementation: str) -> None:
    high, count = 100, 2000
    ordinals = torch.arange(count)
    drawn = uniform_integers(
        KEY, ordinals, torch.zeros_like(ordinals), 100, high, implementation=implementation
    )
    assert int(drawn.min()) == 0 and int(drawn.max()) == high - 1
    observed = torch.bincount(drawn.flatten(), minlength=high).double()
    expected = drawn.numel() / high
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # mean high - 1, standard deviation sqrt(2 (high - 1)): five of them
    assert abs(chi_square - (high - 1)) < 5 * math.sqrt(2 * (high - 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_floats_and_normals_have_their_moments(implementation: str) -> None:
    ordinals, positions = coordinates(4000)
    floats = uniform_floats(KEY, ordinals, positions, 50, implementation=implementation)
    assert floats.dtype == torch.float32 and 0 <= float(floats.min()) and float(floats.max()) < 1
    assert abs(float(floats.double().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / floats.numel())

    std, cut = 0.02, 2.0
    rows = truncated_normal_rows(KEY, range(4000), 50, std, cut, implementation=implementation).double()
    assert float(rows.abs().max()) <= std * cut * (1 + UNIT[torch.float32])  # rounded once
    # variance of a standard normal law cut at c: 1 - 2 c phi(c) / erf(c / sqrt 2)
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    variance = std**2 * (1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
    assert abs(float(rows.mean())) < 5 * math.sqrt(variance / rows.numel())
    # the variance of a sample of a law with lighter tails than the normal one, whose error it is
    assert float(rows.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / rows.numel()))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("draws", [0, 1, 3, 4, 129])
def test_triton_gives_the_bits_of_the_reference(device: torch.device, draws: int) -> None:
    # several programs each with 129 draws; coordinates of all 64 bits, of which positions use 32
    generator = torch.Generator().manual_seed(3)
    ordinals, positions = torch.randint(-(2**63), 2**63 - 1, (2, 37), generator=generator).to(device)

    def agree(function, *settings, **named) -> torch.Tensor:
        drawn, expected = (
            function(KEY, *settings, **named, implementation=way).cpu() for way in ("triton", "reference")
        )
        assert drawn.dtype == expected.dtype and torch.equal(drawn, expected)
        return drawn

    for high in (1, 3883, 2**31 + 7, 2**32):
        agree(uniform_integers, ordinals, positions, draws, high)
    agree(uniform_integers, ordinals, positions, draws, 2**31, dtype=torch.int32)
    agree(uniform_floats, ordinals, positions, draws)
    agree(uniform_integers, ordinals[::2], positions.int()[::2], draws, 10)
    agree(uniform_integers, ordinals[:0], positions[:0], draws, 10)
    # the words are the same, the inverse normal law is the device's
    if device.type == "cpu":
        agree(truncated_normal_rows, ordinals, draws, 0.02)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton"])
def test_a_compiler_traces_through(device: torch.device, implementation: str) -> None:
    if implementation == "cpp":
        device = torch.device("cpu")
    ordinals, positions = (x.to(device) for x in coordinates(9))

    def both(ordinals: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"implementation": implementation}
        return (
            uniform_integers(KEY, ordinals, positions, 5, 100, dtype=torch.int32, **settings) + 1,
            uniform_floats(KEY, ordinals, positions, 3, **settings) * 2,
        )

    traced = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for some in (ordinals, ordinals[:4]):
        for found, expected in zip(traced(some, positions[: len(some)]), both(some, positions[: len(some)])):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_the_triton_operator_is_a_good_citizen_of_torch(device: torch.device) -> None:
    ordinals, positions = (x.to(device) for x in coordinates(6))
    uniform_floats(KEY, ordinals, positions, 1, implementation="triton")  # registers it
    operator = torch.ops.gr_kernels.counter_draws_triton
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        torch.library.opcheck(operator, (-5, ordinals, positions, 7, 1000, dtype))
    torch.library.opcheck(operator, (5, ordinals, None, 7, 0, torch.float64))


@pytest.mark.gpu
def test_triton_beyond_two_to_the_31_draws(device: torch.device) -> None:
    rows, draws = 2**25 + 3, 65  # 9 GB
    ordinals = torch.arange(rows, device=device)
    drawn = uniform_integers(KEY, ordinals, ordinals, draws, 3883, dtype=torch.int32)
    for part in (slice(0, 3), slice(2**31 // draws - 2, 2**31 // draws + 3), slice(rows - 3, rows)):
        some = ordinals[part]
        expected = uniform_integers(KEY, some, some, draws, 3883, implementation="reference")
        assert torch.equal(drawn[part].long(), expected)


@pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
def test_explain_names_the_implementation() -> None:
    ordinals, positions = coordinates(3)
    for function, settings in (
        (uniform_integers, (ordinals, positions, 4, 10)),
        (uniform_floats, (ordinals, positions, 4)),
        (truncated_normal_rows, (range(3), 4, 1.0)),
    ):
        assert explain(function, KEY, *settings).startswith("cpp (")
        assert explain(function, KEY, *settings, implementation="reference").startswith("reference (")
    meta = (x.to("meta") for x in (ordinals, positions))
    sentence = explain(uniform_integers, KEY, *meta, 4, 10)
    assert sentence.startswith("reference (") and "triton can't" in sentence and "cpp can't" in sentence


def test_threads_change_nothing() -> None:
    ordinals, positions = coordinates(5000)
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(uniform_integers(KEY, ordinals, positions, 31, 3883))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_keys_name_streams() -> None:
    assert derive_key(1, "items") == derive_key(1, "items")
    keys = {
        derive_key(*words)
        for words in [
            (1,),
            (2,),
            (1, 2),
            (2, 1),
            (1, "2"),
            (1, "init"),
            (1, "init", 0),
            (1, 0),
            (1, 0, 0),
            (-1,),
        ]
    }
    assert len(keys) == 10 and all(0 <= key < 2**64 for key in keys)
    # pinned: a change of the derivation would change every stream of every run
    assert derive_key(20260101, "negatives", 3) == 0xA4E890CEEDC42BCE
    with pytest.raises(TypeError, match="float"):
        derive_key(1, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 bits"):
        derive_key(2**64)


def test_empty_and_strided_inputs() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert uniform_integers(KEY, none, none, 5, 10).shape == (0, 5)
    assert truncated_normal_rows(KEY, range(0), 4, 1.0).shape == (0, 4)
    ordinals, positions = coordinates(20)
    strided = uniform_integers(KEY, ordinals[::2], positions.int()[::2], 5, 10)
    assert torch.equal(strided, uniform_integers(KEY, ordinals, positions, 5, 10)[::2])


def test_errors_say_what_is_wrong() -> None:
    ordinals, positions = coordinates(3)
    with pytest.raises(ValueError, match="high must lie in"):
        uniform_integers(KEY, ordinals, positions, 4, 0)
    with pytest.raises(ValueError, match="high must lie in"):
        uniform_integers(KEY, ordinals, positions, 4, 2**31 + 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="vectors of one length"):
        uniform_integers(KEY, ordinals, positions[:2], 4, 10)
    with pytest.raises(ValueError, match="on meta: move one"):
        uniform_integers(KEY, ordinals, positions.to("meta"), 4, 10)
    with pytest.raises(ValueError, match="'auto' or one of 'cpp', 'triton', 'reference'"):
        uniform_floats(KEY, ordinals, positions, 4, implementation="cuda")
    with pytest.raises(ValueError, match="31 bits"):
        uniform_floats(KEY, ordinals, positions, 2**31, implementation="triton")
    with pytest.raises(ValueError, match="derive_key"):
        uniform_integers(-1, ordinals, positions, 4, 10)
    with pytest.raises(ValueError, match="cut"):
        truncated_normal_rows(KEY, ordinals, 4, 1.0, cut=0.0)
