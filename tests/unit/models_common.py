"""Small batches, configs, tables and models for the tests of models."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from gr import config
from gr.batch import SequenceBatch
from gr.embeddings.local import LocalTable
from gr.embeddings.table import TableSpec
from gr.models.layout import JaggedLayout
from gr.models.model import Model
from gr.models.step import StepContext
from gr.processes import Axis, Processes
from gr.train.engines.all_reduce import AllReduce
from gr.train.slices import Slices

LENGTHS = (9, 0, 1, 5, 8, 2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def layout(lengths=LENGTHS, seed=0):
    """A layout with times whose differences fall into many buckets."""
    actions = sum(lengths)
    times = torch.exp(torch.rand(actions + 1, generator=generator(seed), dtype=torch.float64) * 12).long()
    times = times.sort().values
    return JaggedLayout(offsets(lengths), tuple(lengths), max(lengths, default=0), times[1:], times[:-1])


def batch(lengths=LENGTHS, items=40, seed=0, times=True):
    actions = sum(lengths)
    g = generator(seed)
    columns = {"item": torch.randint(0, items, (actions,), generator=g)}
    if times:
        columns["time"] = torch.randint(0, 10**6, (actions,), generator=g).sort().values
    return SequenceBatch(
        offsets_B1=offsets(lengths),
        ordinals_B=torch.arange(len(lengths)) * 7 + 3,
        lengths=tuple(lengths),
        columns=columns,
    )


def randomise(module, seed=1, std=0.5):
    """Parameters of unit scale, a model's tables too: a fresh one's are so small that most mistakes would not show."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in named(module).values():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * std)
    return module


def parts(x_TD, lengths):
    return x_TD.split(list(lengths))


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def named(module: nn.Module):
    """All parameters by name; of a model, its tables' too."""
    return dict(module.named_dense() if isinstance(module, Model) else module.named_parameters())


def in_double(model: Model):
    """The model and its tables in float64."""
    for table in model.tables.values():
        table.double()
    return model.double()


@dataclass
class Items:
    """A catalogue of so many items, of which ``training_counts`` says how often each is a training action."""

    rows: int
    training_counts: torch.Tensor | None = None


def local_table(rows, dim, std=1.0, seed=1, name="items", bias=False):
    return LocalTable(LocalTable.Config(), TableSpec(name, rows, dim, std, seed, bias))


def retrieval(run, items, counts=None, processes=None):
    """The model of a run's config; ``counts`` are 0, 1, 2, ... without it."""
    return run.model.build(run, Items(items, torch.arange(items) if counts is None else counts), processes)


def assert_slopes(model, loss, rounding, step=1e-6):
    """Gradients of all parameters, along a random direction each, against central differences of ``loss()``. Float64.

    rounding: how far two losses that are equal but for rounding may be apart. A difference divides it by 2 steps; what
    it leaves out, step^2 / 6 of the third derivative, is less for all derivatives below 1e6 of unit scale.
    """
    loss().backward()
    for name, parameter in named(model).items():
        direction = torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(loss())
                parameter -= sign * step * direction
        slope = (parameter.grad * direction).sum()
        assert slope != 0, name
        difference = (values[0] - values[1]) / (2 * step)
        assert (difference - slope).abs() <= rounding / (2 * step), name


def loss_of(model, supervision, step=7, candidates=None):
    """The model's sum of losses with the views of a step; a step's key, or its context."""
    context = step if isinstance(step, StepContext) else StepContext(step, candidates)
    return model(supervision, replace(context, views=model.views([supervision], context)))


def run_config(encoder="hstu", objective="sampled_softmax", task="next_item", dim=8, length=10, **sections):
    model = {"dim": dim, "encoder": encoder, "task": task, **sections.pop("model", {})}
    raw = {"data": {"path": "none", "max_length": length}, "model": model, "objective": objective}
    return config.from_dict({**raw, "optimizer": {"name": "adamw"}, **sections})


class Tiny(Model):
    """The mean of the looked-up rows through a linear layer; a micro-batch is a tensor of rows.

    ``extra``: whether it has a parameter more.
    """

    def __init__(self, table, outputs=2, extra=False):
        super().__init__([table])
        torch.manual_seed(0)
        self.layer = nn.Linear(table.dim, outputs)
        if extra:
            self.more = nn.Linear(2, 2)

    def supervise(self, batch, key, dropout_key=0):
        return batch

    def wanted(self, parts, context):
        return {name: list(parts) for name in self.tables}

    def forward(self, part, context):
        (view,) = context.views.values()
        return self.layer(view.lookup(part)).square().sum()


def engine_of(model, optimizer, clip_norm=None, processes=None, kind=AllReduce):
    """The plain engine of a model, as a run has it; ``optimizer``: the component."""
    processes = processes or Processes(model.device)
    return kind.Config().build(model, optimizer, processes, clip_norm=clip_norm, bf16=False)


def whole(tensor, world=Axis()):
    """A copy of a named tensor, with the slices that other processes hold."""
    if not isinstance(tensor, Slices):
        return tensor.clone()
    total = torch.zeros(tensor.size())
    for offsets, values in tensor.parts.items():
        total[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return world.add_up(total)


def fill(tensor, values):
    """Give a named tensor, or this process's slices of it, new values."""
    for offsets, part in (
        tensor.parts.items() if isinstance(tensor, Slices) else [((0,) * tensor.dim(), tensor)]
    ):
        part.copy_(values[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))])


def train_step(engine, parts, targets=1, key=0, rate=1.0):
    """A step on micro-batches; the sum of their losses, and the norm if gradients are clipped."""
    loss = engine.forward_backward(parts, StepContext(key), targets)
    return loss.item(), engine.step(rate)
