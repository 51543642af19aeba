"""Small batches and configs for the tests of models."""

import torch
from torch import nn

from gr import config
from gr.batch import SequenceBatch
from gr.models.layout import JaggedLayout

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
    """Parameters of unit scale: a fresh model's are so small that most mistakes would not show."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * std)
    return module


def parts(x_TD, lengths):
    return x_TD.split(list(lengths))


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def named(module: nn.Module):
    return dict(module.named_parameters())


def run_config(encoder="hstu", objective="sampled_softmax", task="next_item", dim=8, length=10, **sections):
    model = {"dim": dim, "encoder": encoder, "task": task, **sections.pop("model", {})}
    raw = {"data": {"path": "none", "max_length": length}, "model": model, "objective": objective}
    return config.from_dict({**raw, "optimizer": {"name": "adamw"}, **sections})
