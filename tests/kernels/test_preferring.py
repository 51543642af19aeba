"""preferring(): one name for the implementation of every operator called inside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels import (
    AttentionMask,
    RelativeBias,
    bias_table_gradient,
    concat_jagged,
    explain,
    hstu_attention,
    jagged_dropout,
    native,
    preferring,
    sampled_softmax,
    split_jagged,
    uniform_integers,
)
from gr_kernels.dispatch import PREFERENCES, CannotRun

OFFSETS = torch.tensor([0, 2, 5])
ROWS = torch.arange(5)
compiled = pytest.mark.skipif(not native.available(), reason="the C++ operators aren't built")


def attend(x: Tensor, **settings: Any) -> Tensor:
    offsets = OFFSETS.to(x.device)
    return hstu_attention(x, x, x, offsets, max_length=3, divisor=3.0, **settings)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, 1, 16, generator=generator, dtype=dtype)


def draws(**settings: Any) -> str:
    return explain(uniform_integers, 7, ROWS, ROWS, 4, 100, **settings)


@compiled
def test_inside_auto_is_the_preferred_one() -> None:
    assert draws().startswith("cpp (")
    with preferring("reference"):
        assert draws().startswith("reference (")
        assert explain(attend, rows()).startswith("reference (")
        assert draws(implementation="cpp").startswith("cpp (")  # a call that names one gets that
    assert draws().startswith("cpp (")


@compiled
def test_the_innermost_counts_and_ends_whatever_happens() -> None:
    with preferring("reference"):
        with preferring("auto"):
            assert draws().startswith("cpp (")
        with pytest.raises(ZeroDivisionError), preferring("cpp"):
            raise ZeroDivisionError
        assert draws().startswith("reference (")
    assert draws().startswith("cpp (")


def test_an_operator_without_that_implementation_chooses() -> None:
    x = rows().flatten(1)
    with preferring("cpp"):  # jagged_dropout has none in C++
        assert explain(jagged_dropout, x, 0.5, key=3).startswith("reference (")
    queries, table = torch.randn(5, 4), torch.randn(9, 4)
    with preferring("cuda"):
        assert explain(sampled_softmax, queries, table, ROWS, ROWS).startswith("scores (")


def test_one_that_has_it_but_cannot_run_it_says_so() -> None:
    with (
        preferring("cpp"),
        pytest.raises(CannotRun, match="hstu_attention: implementation 'cpp' can't run here"),
    ):
        attend(rows(torch.float64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no GPU")
@pytest.mark.parametrize(
    "call",
    [
        lambda: concat_jagged([torch.zeros(5, 2)], [OFFSETS]),
        lambda: split_jagged(torch.zeros(5, 2), OFFSETS, torch.tensor([1, 1]), tail_rows=2),
        lambda: bias_table_gradient(torch.zeros(5), ROWS, 5),
    ],
    ids=["concat", "split", "table gradient"],
)
def test_cuda_is_asked_of_the_operators_that_have_it(call: Callable[[], object]) -> None:
    with (
        preferring("cuda"),
        pytest.raises(CannotRun, match="'cuda' can't run here: the tensors are on cpu"),
    ):
        call()


@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(native.why_no_cuda()), reason="needs the CUDA operators"
)
def test_cuda_runs_where_an_operator_has_it() -> None:
    x, offsets = torch.zeros(5, 2, device="cuda"), OFFSETS.cuda()
    with preferring("cuda"):
        assert explain(concat_jagged, [x], [offsets]).startswith("cuda (")
        assert explain(bias_table_gradient, x[:, 0], ROWS.cuda(), 5).startswith("cuda (")
        assert explain(attend, rows().cuda()).startswith("triton (")


@pytest.mark.parametrize("name", ["chunked", "Triton", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="preferring: the implementation must be one of 'auto', 'cuda', "):
        with preferring(name):
            pass


def test_every_preference_is_an_implementation_of_several_operators() -> None:
    from gr_kernels.bias_table_gradient.op import IMPLEMENTATIONS as TABLE_GRADIENT
    from gr_kernels.counter_random.op import IMPLEMENTATIONS as COUNTER_RANDOM
    from gr_kernels.jagged.concat_split.op import IMPLEMENTATIONS as CONCAT_SPLIT

    named = [{way.name for way in ways} for ways in (TABLE_GRADIENT, COUNTER_RANDOM, CONCAT_SPLIT)]
    for name in PREFERENCES:
        assert name == "auto" or sum(name in names for names in named) > 1


@compiled
def test_it_holds_for_operators_inside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of dropout draws its words with uniform_integers."""
    from gr_kernels.counter_random import reference

    drawn = []
    original = reference.uniform_integers
    monkeypatch.setattr(reference, "uniform_integers", lambda *a: drawn.append(a) or original(*a))
    x = rows().flatten(1)
    free = jagged_dropout(x, 0.5, key=3)
    assert not drawn
    with preferring("reference"):
        assert torch.equal(jagged_dropout(x, 0.5, key=3), free)
    assert drawn


@pytest.mark.skipif(torch.cuda.is_available(), reason="about what a CPU can't run")
def test_an_implementation_within_does_not_pass_the_preference_on_where_it_cannot_be_met() -> None:
    """The attention has no CUDA implementation; that of its tables' gradients, which it may use, needs a GPU."""
    table = torch.zeros(3, requires_grad=True)
    x = rows()
    mask = AttentionMask(window=2)  # not the C++ attention's
    bias = RelativeBias(table)
    with preferring("cuda"):
        assert explain(attend, x, mask=mask, bias=bias).startswith("blocked (")
        attend(x, mask=mask, bias=bias).sum().backward()
    assert table.grad is not None and bool(table.grad.any())


@compiled
def test_other_threads_start_without() -> None:
    found: list[str] = []
    with preferring("reference"):
        thread = threading.Thread(target=lambda: found.append(draws()))
        thread.start()
        thread.join()
        assert draws().startswith("reference (")
    assert found[0].startswith("cpp (")


@compiled
@pytest.mark.parametrize("inside", [False, True])
def test_the_backward_pass_belongs_to_the_call(inside: bool) -> None:
    """Forward under one preference, backward under another: the gradients are, bit for bit, those of the first."""

    def gradient(name: str, backward_inside: bool) -> Tensor:
        x = rows().requires_grad_()
        with preferring(name):
            loss = attend(x).square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            with preferring("cpp"):
                loss.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient("reference", inside), gradient("reference", not inside))
    x = rows().requires_grad_()
    assert "hstu_attention" in type(attend(x).grad_fn).__name__  # the compiled operator's
    with preferring("reference"):
        assert "hstu_attention" not in type(attend(x).grad_fn).__name__


@compiled
def test_compiled_code_follows_the_preference() -> None:
    """One graph a preference, guarded; and a preference may be part of what is compiled."""
    torch._dynamo.reset()
    graphs: list[bool] = []  # whether each has the compiled operator

    def note(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(any("jagged_concat" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    def join(x: Tensor) -> Tensor:
        return concat_jagged([x, x], [OFFSETS, OFFSETS])[0]

    call = torch.compile(join, backend=note, fullgraph=True)
    x = rows()
    call(x)
    with preferring("reference"):
        inside = call(x)
        call(x)
    call(x)
    assert graphs == [True, False]
    assert torch.equal(inside, join(x))

    def within(x: Tensor) -> Tensor:
        with preferring("reference"):
            return join(x)

    graphs.clear()
    torch.compile(within, backend=note, fullgraph=True)(x)
    assert graphs == [False]
    assert draws().startswith("cpp (")
