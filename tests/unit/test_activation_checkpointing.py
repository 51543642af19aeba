"""Layers that are formed again in the backward pass: the same bits, the same kernels, less that is kept."""

from __future__ import annotations

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.models.hstu import HSTU
from gr.models.layers import Stack
from gr.models.sasrec import SASRec
from gr.models.transformer import Transformer
from gr.train import job
from gr_kernels.dispatch import preferred, preferring
from tests.end_to_end.tiny import make_dataset, write_config
from tests.unit.models_common import generator, layout, randomise

DIM = 8
CONFIGS = {
    "hstu": HSTU.Config(heads=2, qk_dim=3, v_dim=4, layers=3, attention_dropout=0.1),
    "sasrec": SASRec.Config(heads=2, ffn=12, layers=3),
    "transformer": Transformer.Config(heads=2, layers=3),
}


def encoder_of(name, recompute):
    encoder = randomise(CONFIGS[name].build(DIM, 12), std=0.2).train()
    (stack,) = [module for module in encoder.modules() if isinstance(module, Stack)]
    stack.recompute = recompute
    return encoder, stack


def run(name, recompute, kernels="auto"):
    """(output, gradients of input and parameters, preferred kernels of each call of a layer, numbers kept)."""
    encoder, stack = encoder_of(name, recompute)
    calls, kept, where = [], 0, layout()
    for layer in stack:
        layer.register_forward_pre_hook(lambda *_: calls.append(preferred()))
    x_TD = torch.randn(where.rows, DIM, generator=generator(4)).requires_grad_()

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(5)
    with preferring(kernels), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = encoder(x_TD, where)
    torch.manual_seed(
        6
    )  # draws in between change nothing, and those of the backward pass are not seen afterwards
    state = torch.get_rng_state()
    gradients = torch.autograd.grad(out_TD.square().sum(), [x_TD, *encoder.parameters()])
    assert torch.equal(torch.get_rng_state(), state)
    return out_TD, gradients, calls, kept


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_formed_again_give_the_same_bits_and_keep_less(name):
    out, gradients, calls, kept = run(name, False)
    again, theirs, their_calls, left = run(name, True)
    assert torch.equal(out, again)
    assert all(torch.equal(mine, other) for mine, other in zip(gradients, theirs, strict=True))
    assert (len(calls), len(their_calls)) == (3, 6)
    assert left < kept / 4


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
def test_layers_are_formed_again_by_the_kernels_that_were_preferred(kernels):
    *_, calls, _ = run("hstu", True, kernels)
    assert calls == [kernels] * 6 and preferred() == "auto"


def test_evaluation_forms_layers_once():
    encoder, stack = encoder_of("hstu", True)
    calls, where = [], layout()
    stack[0].register_forward_pre_hook(lambda *_: calls.append(1))
    encoder.eval()(torch.randn(where.rows, DIM).requires_grad_(), where).sum().backward()
    assert calls == [1]


def test_a_run_forms_them_again_and_an_encoder_without_layers_is_refused(tmp_path):
    make_dataset(tmp_path / "data", users=40)
    again = ["train.activation_checkpointing=true", "train.max_steps=3", "eval.splits=[]"]
    losses = []
    for name, overrides in (("kept", again[1:]), ("again", again)):
        config = configs.load(write_config(tmp_path, tmp_path / "data", tmp_path / name), overrides)
        losses.append([row["loss"] for row in job.run(config).metrics if row["kind"] == "train"])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    config = write_config(tmp_path, tmp_path / "data", tmp_path / "gru")
    with pytest.raises(UserError, match=r"model\.encoder gru4rec has no such layers: leave it out"):
        job.run(configs.load(config, [*again, "model.encoder={name: gru4rec}"]))
