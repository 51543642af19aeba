"""Where the time of a step goes: torch's profiler, each moment given to one part.

Method.  The self time of every event (its duration less its children's) belongs to a part:
  - data, loss, optimiser: what runs inside the marked region, in the forward pass;
  - attention: inside the region so marked, or the attention operator;
  - linear: aten::linear, and the fused layers around the attention, outside those;
  - a node of the backward pass belongs where the forward operator that recorded it does (same autograd sequence
    number), with all that runs below it;
  - other: the rest: embedding lookups, norms, gates, dropout, gradient accumulation, Python between operators.
So the parts add up to the time of the step, and waiting for threads is inside the operator that waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("data", "attention", "linear", "loss", "optimiser", "other")
STEP = "region:step"
BACKWARD = "autograd::engine::evaluate_function: "
LINEAR = ("aten::linear", "gr_kernels::norm_linear_silu", "gr_kernels::gated_output")
ATTENTION = "gr_kernels::hstu_attention"  # what the names of all its operators begin with


def measure(step: Callable[[Any], object], inputs: Iterable[Any]) -> dict[str, Any]:
    """Profile ``step`` on each of ``inputs``: shares (parts -> fraction, sum 1), ms a step, the heaviest operators."""
    count = 0
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for value in inputs:
            count += 1
            with record_function(STEP):
                step(value)
    events = [event for event in trace.events() if _root(event).name == STEP]
    micros = attribute(events)
    total = sum(micros.values())
    operators = sorted(_by_operator(events).items(), key=lambda item: -item[1])[:15]
    return {
        "shares": {part: micros[part] / total for part in PARTS},
        "step_ms": total / count / 1e3,
        "steps": count,
        "operators_ms": {f"{part}: {name}": round(time / count / 1e3, 3) for (part, name), time in operators},
    }


def attribute(events: list[Any]) -> dict[str, float]:
    """Microseconds of self time by part."""
    micros: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for (part, _), time in _by_operator(events).items():
        micros[part] += time
    return micros


def _by_operator(events: list[Any]) -> dict[tuple[str, str], float]:
    """Microseconds of self time by (part, name of the event)."""
    forward: dict[int, Any] = {}
    nodes: dict[int, Any] = {}
    for event in events:
        node = next((e for e in _upwards(event) if e.name.startswith(BACKWARD)), None)
        if node is not None:
            nodes[id(event)] = node
        elif event.sequence_nr >= 0:
            # several operators see the same number before one takes it: the last to start
            last = forward.get(event.sequence_nr)
            if last is None or event.time_range.start >= last.time_range.start:
                forward[event.sequence_nr] = event
    times: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        made_by: Any = event
        if (node := nodes.get(id(event))) is not None:
            made_by = forward.get(node.sequence_nr)
        part = "other" if made_by is None else _part(made_by)
        times[part, event.name] += event.self_cpu_time_total
    return times


def _part(event: Any) -> str:
    """The part of an event of the forward pass."""
    part = "other"
    for e in _upwards(event):
        if e.name.startswith("region:") and e.name != STEP:
            return str(e.name).removeprefix("region:")
        if e.name.startswith(ATTENTION):
            part = "attention"
        elif e.name.startswith(LINEAR) and part == "other":
            part = "linear"
    return part


def _upwards(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _root(event: Any) -> Any:
    *_, root = _upwards(event)
    return root
