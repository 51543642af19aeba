"""Adapters: at first they change nothing, to the bit; they alone train; and they are what their papers say."""

from __future__ import annotations

import copy
import re
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gr.adapters.insert import freeze_layers, insert
from gr.adapters.section import AdapterSection
from gr.adapters.slot import Slot
from gr.errors import UserError
from gr.models.gru4rec import GRU4Rec
from gr.models.hstu import HSTU
from gr.models.init import initialise
from gr.models.sasrec import SASRec
from gr.models.transformer import Transformer
from tests.packages import needs
from tests.unit.models_common import LENGTHS, generator, layout, randomise

METHODS = ("houlsby", "parallel", "pfeiffer", "compacter", "k_adapter", "lora", "bitfit")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
}
TEXT = {"vocab_size": 20, "max_position_embeddings": 24}
PIXELS = {"image_size": 16, "patch_size": 4}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
KINDS = {
    "bert": ("BertConfig", TEXT | SHAPE),
    "roberta": ("RobertaConfig", TEXT | SHAPE),
    "distilbert": ("DistilBertConfig", TEXT | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "opt": ("OPTConfig", TEXT | OPT),
    "vit": ("ViTConfig", PIXELS | SHAPE),
    "mae": ("ViTMAEConfig", PIXELS | SHAPE | {"mask_ratio": 0.0}),
    "swin": ("SwinConfig", PIXELS | SWIN),
}
TUPLES = {"mpnet": ("MPNetConfig", TEXT | SHAPE), "deberta": ("DebertaV2Config", TEXT | SHAPE)}
"""Whose blocks give more than one thing."""
STAGES = {"resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]})}
OURS = {
    "hstu": HSTU.Config(heads=2, qk_dim=8, v_dim=8),
    "sasrec": SASRec.Config(heads=2, ffn=24, affine_norms=True, final_norm=True),
    "transformer": Transformer.Config(heads=2),
    "post-norm": Transformer.Config(heads=2, norm="post", input_norm=True),
}
NOT_TOGETHER = {("swin", "k_adapter")}  # its states have many widths


@cache
def encoder_of(kind):
    """A tiny encoder of transformers with weights of unit size."""
    import transformers

    name, settings = (KINDS | TUPLES | STAGES)[kind]
    torch.manual_seed(0)
    return randomise(
        transformers.AutoModel.from_config(getattr(transformers, name)(**settings)).eval(), std=0.3
    )


def run_encoder(kind, model):
    if kind in ("vit", "mae", "swin"):
        given = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator(3))}
        if kind == "mae":
            given["noise"] = torch.arange(16).expand(2, -1)
    else:
        given = {"input_ids": torch.arange(14).view(2, 7) + 3}
    return model(**given).last_hidden_state


@cache
def ours_of(kind):
    config = OURS[kind]
    return randomise(config.build(16, 20).eval(), std=0.3)


def run_ours(kind, model):
    x = torch.randn(sum(LENGTHS), 16, generator=generator(5))
    return model(x, layout())


def run(kind, model):
    return (run_ours if kind in OURS else run_encoder)(kind, model)


def fresh(kind):
    if kind not in OURS:
        needs("transformers")
    return copy.deepcopy(ours_of(kind) if kind in OURS else encoder_of(kind))


def put_in(model, name, size=4, **more):
    """The names of what trains."""
    insert(model, AdapterSection(name=name, size=size, **more), 7)
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [*KINDS, *OURS])
def test_at_first_nothing_has_changed_and_adapters_alone_train(kind, name):
    before, model = fresh(kind), fresh(kind)
    if (kind, name) in NOT_TOGETHER:
        with pytest.raises(UserError, match=f"adapters {name} find no place"):
            put_in(model, name)
        return
    training = put_in(model, name)
    old = dict(before.named_parameters())
    with torch.no_grad():  # torch takes other kernels where weights have gradients
        assert torch.equal(run(kind, model), run(kind, before))
    own = {n for n in training if n not in old}
    assert training == ({n for n in old if n.endswith("bias")} if name == "bitfit" else own) and training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # what leads down has no gradient where what leads up is zero
        run(kind, model).square().sum().backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    moved = {n for n in training if parameters[n].grad is not None and parameters[n].grad.abs().max() > 0}
    still = training - moved
    assert all(n.endswith("bias") for n in still) if name == "bitfit" else not still, still
    assert all(torch.equal(p, parameters[n]) for n, p in old.items() if n not in training)
    assert not torch.equal(run(kind, model), run(kind, before))


def test_what_is_published_is_found_again():
    """Trainable parameters on a BERT-base's shape: Houlsby of 64 twice a block, Pfeiffer once, LoRA of rank 12."""
    needs("transformers")
    import transformers

    with torch.device("meta"):
        whole = transformers.AutoModel.from_config(
            transformers.BertConfig(vocab_size=20), add_pooling_layer=False
        )
    counts = {}
    for name, size in {"houlsby": 64, "parallel": 64, "pfeiffer": 64, "lora": 12, "k_adapter": 192}.items():
        model = copy.deepcopy(whole)
        with torch.device("meta"):
            insert_shapes(model, name, size)
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["houlsby"] == counts["parallel"] == 2 * counts["pfeiffer"] == 24 * (2 * 768 * 64 + 768 + 64)
    assert counts["lora"] == 24 * 2 * 768 * 12
    assert counts["k_adapter"] == 12 * (2 * 768 * 192 + 768 + 192)


def insert_shapes(model, name, size):
    from gr.adapters.insert import METHODS as methods

    model.requires_grad_(False)
    for _, parameter in methods[name](model, size):
        parameter.requires_grad_(True)


def test_norms_train_where_they_are_asked_for():
    model = fresh("sasrec")
    training = put_in(model, "houlsby", norms=True)
    assert {n for n in training if "norm" in n} == {n for n, _ in model.named_parameters() if "norm" in n}
    assert put_in(fresh("sasrec"), "full") == {n for n, _ in model.named_parameters() if "adapter" not in n}
    assert put_in(fresh("sasrec"), "frozen") == set()


@pytest.mark.parametrize("kind", ["hstu", "sasrec", "post-norm"])
def test_lora_of_ours_is_another_weight(kind):
    """The output with W and a low rank is that with their sum, whichever rows of W make queries and values."""
    adapted, plain = fresh(kind).double(), fresh(kind).double()
    put_in(adapted, "lora", 3)
    adapted.double()
    randomise(nn.ModuleList(m for n, m in adapted.named_modules() if n.endswith("adapter")), std=0.3)
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            for part, rows in getattr(layer, "query_value", {}).items():
                low = layer.adapter.parts[part]
                weight = plain.get_parameter(f"{name}.weight")
                weight[rows.start : rows.stop] += low.up.weight @ low.down.weight
    x = torch.randn(sum(LENGTHS), 16, generator=generator(5), dtype=torch.float64)
    torch.testing.assert_close(adapted(x, layout()), plain(x, layout()), rtol=0, atol=1e-12)


def test_lora_is_that_of_peft():
    """Of the same factors, in float64."""
    needs("transformers", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = fresh("bert").double(), fresh("bert").double()
    put_in(ours, "lora", 3)
    ours.double()
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["query", "value"])
    theirs = inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(getattr(module, "adapter", None), nn.Module):
                module.adapter.up.weight.normal_(generator=generator(1))
                other = theirs.get_submodule(name)
                other.lora_A["default"].weight.copy_(module.adapter.down.weight)
                other.lora_B["default"].weight.copy_(module.adapter.up.weight)
    found, wanted = run_encoder("bert", ours), run_encoder("bert", theirs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert not torch.equal(found, run_encoder("bert", fresh("bert").double()))


def test_a_slot_is_serial_or_parallel():
    output, x = (torch.randn(5, 8, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    adapter = randomise(nn.Linear(8, 8).double())
    for residual, beside, given in ((False, False, output), (True, False, output - x), (False, True, x)):
        slot = Slot(8, 8, residual)
        assert slot(output, x) is output
        slot.adapter, slot.beside = adapter, beside
        assert torch.equal(slot(output, x), output + adapter(given))


@pytest.mark.parametrize("kind", ["bert", "opt", "vit"])
def test_parallel_is_beside_both_sublayers(kind):
    """An adapter reads what the sublayer read, and not what it gave."""
    model = fresh(kind).double()
    put_in(model, "parallel", 4)
    model.double()
    seen, inputs = [], []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "adapter", None), nn.Module):
            module.adapter.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        if name.endswith(("query", "q_proj", "intermediate.dense", "fc1")):
            module.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    run_encoder(kind, model)
    assert len(seen) == 4 == len(inputs)
    assert all(torch.equal(given, wanted) for given, wanted in zip(seen, inputs, strict=True))


@pytest.mark.parametrize("kind", ["bert", "vit", "hstu", "sasrec", *TUPLES])
def test_k_adapter_adds_a_sum_over_all_blocks(kind):
    """h + s, s_i = s_{i-1} + bottleneck_i(h_i + s_{i-1}); behind a last norm where there is one."""
    model = fresh(kind)
    put_in(model, "k_adapter", 4)
    side = model.side
    randomise(side, std=0.3)
    hidden = []
    blocks = next(m for n, m in model.named_modules() if n.endswith(("layer", "layers", "blocks")))
    for block in blocks:
        block.register_forward_hook(
            lambda module, given, output: hidden.append(output[0] if type(output) is tuple else output),
            prepend=True,
        )
    found = run(kind, model)
    s = torch.zeros(())
    for step, h in zip(side.steps, hidden, strict=True):
        x = h + s
        s = s + F.linear(F.gelu(F.linear(x, step.down.weight, step.down.bias)), step.up.weight, step.up.bias)
    norm = {"vit": getattr(model, "layernorm", None), "sasrec": getattr(model, "final_norm", None)}.get(kind)
    wanted = hidden[-1] + s
    torch.testing.assert_close(found, wanted if norm is None else norm(wanted), rtol=1e-5, atol=1e-5)
    frozen = [p for n, p in model.named_parameters() if not n.startswith("side")]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ("kind", "layers", "training"),
    [
        ("bert", 1, r"encoder\.layer\.1\.|pooler"),
        ("opt", 1, r"layers\.1\.|decoder\.final_layer_norm"),
        ("vit", 1, r"layers\.1\.|layernorm\.|pooler"),
        ("swin", 1, r"layers\.1\.|^layernorm"),
        ("resnet", 1, r"stages\.0\.layers\.1\.|stages\.1\."),
        ("resnet", 3, r"stages\.1\.layers\.1\."),
    ],
)
def test_the_first_layers_of_every_kind_can_stay(kind, layers, training):
    """Counted through all stages; embeddings stay, a last norm trains."""
    model = fresh(kind)
    model.requires_grad_(True)
    freeze_layers(model, layers)
    named = dict(model.named_parameters())
    found = {name for name, parameter in named.items() if parameter.requires_grad}
    assert found == {name for name in named if re.search(training, name)} and len(found) < len(named)


@pytest.mark.parametrize(("kind", "has"), [("swin", "has 2"), ("dense", "has none that their names tell")])
def test_layers_that_are_not_there_cannot_stay(kind, has):
    with pytest.raises(
        UserError, match=f"freeze is 2, and the encoder, a [A-Za-z]+, {has}: leave one to train"
    ):
        freeze_layers(nn.Linear(2, 2) if kind == "dense" else fresh(kind), 2)


def test_layers_formed_again_have_the_same_gradients_with_adapters():
    gradients = []
    for recompute in (False, True):
        model = fresh("sasrec").train()
        put_in(model, "k_adapter", 4)
        model.blocks.recompute = recompute
        randomise(model.side, std=0.3)
        torch.manual_seed(0)
        run_ours("sasrec", model).square().sum().backward()
        gradients.append([p.grad for p in model.side.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_prompt_stands_behind_the_patches_of_a_picture():
    model = fresh("vit")
    training = put_in(model, "prompt", 3)
    assert training == {"prompt.vectors"}
    assert run_encoder("vit", model).shape[1] == run_encoder("vit", fresh("vit")).shape[1] + 3


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("hstu", "prompt", "adapters prompt stand before the tokens of a text"),
        ("swin", "prompt", "a SwinModel has neither"),
        ("resnet", "prompt", "a ResNetModel has neither"),
        ("gru", "houlsby", "adapters houlsby find no place in a GRU4Rec"),
        ("gru", "lora", "adapters lora find no place in a GRU4Rec"),
        ("hstu", "compacter", "choose a size that 4 divides"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(kind, name, sentence):
    model = GRU4Rec(GRU4Rec.Config(), 16, 20) if kind == "gru" else fresh(kind)
    with pytest.raises(UserError, match=sentence) as refused:
        put_in(model, name, 6)
    assert "\n" not in str(refused.value)


def test_first_values_depend_on_seed_and_name_alone():
    one, other = fresh("hstu"), fresh("hstu")
    put_in(one, "houlsby")
    initialise(nn.Module(), 1)
    put_in(other, "houlsby")
    named = dict(other.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in one.named_parameters())
