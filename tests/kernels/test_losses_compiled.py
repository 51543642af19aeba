"""The losses and scores in one graph of torch.compile: every implementation, forward and backward, equal to eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.candidate_scores.op import IMPLEMENTATIONS as CANDIDATE_SCORES
from gr_kernels.log_partition import cross_entropy, log_partition
from gr_kernels.log_partition.op import IMPLEMENTATIONS as LOG_PARTITION
from gr_kernels.sampled_softmax import sampled_softmax
from gr_kernels.sampled_softmax.op import IMPLEMENTATIONS as SAMPLED_SOFTMAX
from tests.kernels.loss_problems import EPS, inputs
from tests.precision import analysed, assert_within

Function = Callable[..., Tensor]


def _cross_entropy(x: dict[str, Tensor], **settings: Any) -> Tensor:
    targets, weights, bias = x["targets"], x["weights"], x["bias"]
    return cross_entropy(x["queries"], x["table"], targets, weights_T=weights, bias_I=bias, **settings)


def _log_partition(x: dict[str, Tensor], **settings: Any) -> Tensor:
    return log_partition(x["queries"], x["table"], bias_I=x["bias"], normalize_eps=EPS, **settings)


def _log_partition_excluding(x: dict[str, Tensor], **settings: Any) -> Tensor:
    return log_partition(x["queries"], x["table"], bias_I=x["bias"], excluded_TX=x["rows"][:, :2], **settings)


def _own(x: dict[str, Tensor], **settings: Any) -> Tensor:
    return sampled_softmax(
        x["queries"], x["table"], x["targets"], x["rows"], bias_I=x["bias"], normalize_eps=EPS, **settings
    )


def _shared(x: dict[str, Tensor], **settings: Any) -> Tensor:
    items = torch.arange(x["table"].shape[0], device=x["table"].device)
    return sampled_softmax(
        x["queries"],
        x["table"],
        x["targets"],
        items,
        counts_K=x["counts"],
        bias_I=x["bias"],
        max_scores=70,  # a few chunks
        **settings,
    )


def _scores(x: dict[str, Tensor], **settings: Any) -> Tensor:
    scores = candidate_scores(x["queries"], x["table"], x["rows"], normalize_eps=EPS, **settings)
    return scores + x["bias"][x["rows"]]


FUNCTIONS: dict[str, tuple[Function, Any]] = {
    "cross_entropy": (_cross_entropy, LOG_PARTITION),
    "log_partition": (_log_partition, LOG_PARTITION),
    "log_partition excluding": (_log_partition_excluding, LOG_PARTITION),
    "sampled_softmax own": (_own, SAMPLED_SOFTMAX),
    "sampled_softmax shared": (_shared, SAMPLED_SOFTMAX),
    "candidate_scores": (_scores, CANDIDATE_SCORES),
}
CASES = [
    (name, way.name)
    for name, (_, ways) in FUNCTIONS.items()
    for way in ways
    if (name, way.name) != ("log_partition excluding", "cpp")  # which takes none
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LEAVES = ("queries", "table", "bias")


def evaluate(
    function: Function,
    tokens: int,
    device: torch.device,
    implementation: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The value, and the gradients of queries, table and bias."""
    made = inputs(tokens, 30, 8, torch.float32, device)
    made = {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}
    generator = torch.Generator().manual_seed(tokens)
    made["rows"] = torch.randint(0, 30, (tokens, 5), generator=generator).to(device)
    made["counts"] = torch.randint(0, 3, (30,), generator=generator).to(device)
    leaves = [made[leaf].requires_grad_() for leaf in LEAVES]
    value = function(made, implementation=implementation)
    return {"value": value.detach(), **dict(zip(LEAVES, torch.autograd.grad(value.sum(), leaves)))}


def check(found: dict[str, Tensor], function: Function, tokens: int) -> None:
    """Within the bound on rounding of the definition."""
    exact, allowed = analysed(
        lambda: evaluate(function, tokens, torch.device("cpu"), "reference", torch.float64), torch.float32
    )
    assert_within(found, exact, allowed, torch.float32)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_one_graph_that_equals_eager(name: str, implementation: str, device: torch.device) -> None:
    if implementation == "cpp" and not native.available():
        pytest.skip(native.why_unavailable())
    at = torch.device("cpu") if implementation == "cpp" else device
    function, _ = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (7, 9):  # another size: the graph may not hold what was true of the first
        for either in (compiled, function):
            check(evaluate(either, tokens, at, implementation), function, tokens)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_choice_is_made_while_tracing(name: str) -> None:
    cpu = torch.device("cpu")
    function, _ = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check(evaluate(compiled, 7, cpu, "auto"), function, 7)


def test_what_was_compiled_still_checks_its_shapes() -> None:
    made = inputs(4, 6, 3, torch.float32, torch.device("cpu"))
    compiled = torch.compile(cross_entropy, backend="eager")
    with pytest.raises(ValueError, match="targets must be"):
        compiled(made["queries"], made["table"], made["targets"][:3])
