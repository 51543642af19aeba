"""Pre-ranking models: every network against its formula written plainly, gradients, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from gr import config as configs, registry
from gr.batch import UNKNOWN, Jagged, SequenceBatch
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.models.step import StepContext
from gr.models.two_tower.layers import EPS, MOMENTUM, BatchNorm, factorised
from gr.processes import Axis, Processes
from tests.unit.models_common import assert_slopes, generator, in_double, randomise

USERS, ITEMS, GENRES, DIM = 7, 9, 4, 4
GENRE_LISTS = [list(range(item % 3)) for item in range(ITEMS)]  # some have none
COLUMNS = [
    ColumnInfo("item", "int32"),
    ColumnInfo("user", "int64"),
    ColumnInfo("age", "int64", "users"),
    ColumnInfo("mean", "float32"),
    ColumnInfo("label", "int64"),
    ColumnInfo("title", "string"),
    ColumnInfo("tags", "int64", multi=True),
]
SMALL = {
    "lr": {},
    "wide_deep": {"deep": [6, 5], "dropout": 0.0},
    "deepfm": {"deep": [6, 5], "dropout": 0.0},
    "dcn": {"deep": [6, 5], "dropout": 0.0, "cross": 2},
    "autoint": {"deep": [6, 5], "dropout": 0.0, "layers": 2, "heads": 2},
    "cold": {"deep": [6, 5], "dropout": 0.0},
    "dssm": {"tower": [6, 5, 4], "dropout": 0.0},
    "dat": {"tower": [6, 5, 4], "dropout": 0.0},
    "inttower": {"tower": [6, 5, 4], "dropout": 0.0, "heads": 3, "item_heads": 2, "head_dim": 2},
}


def offsets_of(lists):
    return torch.tensor([0, *map(len, lists)]).cumsum(0)


def genres_of(items):
    return torch.tensor([genre for item in items for genre in GENRE_LISTS[item]], dtype=torch.int64)


CATALOGUE = SimpleNamespace(
    rows=ITEMS,
    manifest=SimpleNamespace(columns=COLUMNS, action_type_names=[], users=20),
    column_names=["item_id", "genres"],
    info=lambda name: ColumnInfo(name, "int64", "items", True),
    codes=lambda name: Jagged(offsets_of(GENRE_LISTS), genres_of(range(ITEMS))),
)


def run_config(network="inttower", **sections):
    model = {
        "name": "two_tower",
        "dim": DIM,
        "user": {"fields": {"user": {"column": "user", "rows": USERS}, "age": {"column": "age", "rows": 3}}},
        "item": {
            "fields": {"item": "item", "genres": {"catalogue": "genres", "rows": GENRES}},
            "numbers": ["mean"],
        },
        "tasks": {"like": {"column": "label", "any_of": [1]}},
        "network": {"name": network, **SMALL[network]},
        "l2": 0.0,
    }
    raw = {"data": {"path": "none"}, "optimizer": {"name": "sgd", "lr": 0.1}}
    for key, value in sections.pop("model", {}).items():
        model[key] = {**model[key], **value} if isinstance(value, dict) else value
    return configs.from_dict({**raw, "model": model, **sections})


def build(network="inttower", large=True, **sections):
    run = run_config(network, **sections)
    model = in_double(run.model.build(run, CATALOGUE, Processes(torch.device("cpu"))))
    return randomise(model) if large else model


def batch(rows=11, seed=0, lengths=None):
    """Rows of one action each, unless ``lengths`` says how many."""
    lengths = [1] * rows if lengths is None else lengths
    g, actions = generator(seed), sum(lengths)
    return SequenceBatch(
        offsets_B1=torch.tensor([0, *lengths]).cumsum(0),
        ordinals_B=torch.arange(len(lengths)),
        lengths=tuple(lengths),
        columns={
            "item": torch.randint(0, ITEMS, (actions,), generator=g),
            "user": torch.randint(0, USERS, (actions,), generator=g),
            "mean": torch.rand(actions, generator=g),
            "label": torch.randint(0, 2, (actions,), generator=g),
        },
        user_columns={"age": torch.randint(0, 3, (len(lengths),), generator=g)},
    )


def loss_of(model, given, key=3):
    part = model.supervise(model.prepare(given), 1, key)
    context = StepContext(1)
    return model(part, replace(context, views=model.views([part], context)))


def sides(model, given):
    """By hand: (S, F, D) vectors of user and item, (S, F) of the bias columns or None, (S,) numbers."""
    rows_B = torch.arange(given.sequences)
    ages = given.user_columns["age"][torch.repeat_interleave(rows_B, given.offsets_B1.diff())]
    found = []
    for column in ("weight", "bias"):
        table = {n: getattr(t, column) for n, t in model.tables.items()}
        if table["user"] is None:
            found.append((None, None))
            continue
        user = torch.stack([table["user"][given.columns["user"]], table["age"][ages]], 1)
        zero = torch.zeros_like(table["genres"][0])
        genres = [
            table["genres"][GENRE_LISTS[i]].mean(0) if GENRE_LISTS[i] else zero
            for i in given.items_T.tolist()
        ]
        found.append((user, torch.stack([table["item"][given.items_T], torch.stack(genres)], 1)))
    return *found[0], *found[1], given.columns["mean"].double()


def mlp(tower, x, norm=False, layers=False):
    found = []
    for number, linear in enumerate(tower.linears):
        x = x @ linear.weight.T + linear.bias
        if norm:
            one = tower.norms[number]
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + EPS).sqrt() * one.weight + one.bias
        x = x.clamp_min(0)
        found.append(x)
    return found if layers else x


def expected(model, network, given):
    """(S,) log-odds in training, by the papers' formulas."""
    net = model.network
    user, item, user_first, item_first, number = sides(model, given)
    vectors, number_S1 = torch.cat([user, item], 1), number[:, None]
    both = torch.cat([vectors.flatten(1), number_S1], 1)
    flats = {"user": user.flatten(1), "item": torch.cat([item.flatten(1), number_S1], 1)}
    if network == "lr":
        return vectors.sum((1, 2)) + number * net.numbers.weight[0, 0] + net.bias.weight
    if network in ("dssm", "dat"):
        if network == "dat":
            for side, column in (("user", "user"), ("item", "item")):
                own = model.tables[f"augmented-{side}"].weight[given.columns[column]]
                flats[side] = torch.cat([flats[side], own], 1)
        tops = {side: mlp(net.towers[side], flat, True) for side, flat in flats.items()}
        norms = tops["user"].norm(dim=1) * tops["item"].norm(dim=1)
        return 10 * (tops["user"] * tops["item"]).sum(1) / norms.clamp_min(1e-8) + net.bias.weight
    if network == "inttower":
        for side, block in (("user", net.user_se), ("item", net.item_se)):
            e = user if side == "user" else item
            a = torch.softmax(e.mean(2) @ block.excitation.weight.T, 1)
            e = e + a[:, :, None] * e
            flats[side] = e.flatten(1) if side == "user" else torch.cat([e.flatten(1), number_S1], 1)
        layers = mlp(net.towers["user"], flats["user"], True, True)
        top = mlp(net.towers["item"], flats["item"], True)
        total = []
        for s in range(len(top)):
            item_heads = (net.item_heads.weight @ top[s] + net.item_heads.bias).view(2, 2)
            score = net.bias.weight[0]
            for heads, layer in zip(net.user_heads, layers):
                for head in (heads.weight @ layer[s] + heads.bias).view(3, 2):
                    score = score + max(head @ other for other in item_heads)
            total.append(score)
        return torch.stack(total)
    deep_in = both
    if network == "cold":
        weights = torch.sigmoid(
            vectors.flatten(1) @ net.weights.excitation.weight.T + net.weights.excitation.bias
        )
        deep_in = torch.cat([(vectors * weights[:, :, None]).flatten(1), number_S1], 1)
    read = [mlp(net.mlp, deep_in)]
    extra = net.bias.weight[0]
    if network == "deepfm":
        pairs = [(vectors[:, i] * vectors[:, j]).sum(1) for i in range(4) for j in range(i)]
        extra = extra + torch.stack(pairs).sum(0)
    if network == "dcn":
        x = both
        for w, b in zip(net.cross.weight, net.cross.bias):
            x = both * (x @ w)[:, None] + b + x
        read.insert(0, x)
    if network == "autoint":
        x = vectors
        for layer in net.attention:
            q, k, v, residual = (x @ w.T for w in layer.inside.weight.split(DIM))
            heads = []
            for h in (slice(0, 2), slice(2, 4)):
                scores = torch.softmax(q[..., h] @ k[..., h].transpose(1, 2), 2)
                heads.append(scores @ v[..., h])
            x = (torch.cat(heads, 2) + residual).clamp_min(0)
        read.insert(0, x.flatten(1))
    total = torch.cat(read, 1) @ net.out.weight[0] + extra
    if user_first is not None:
        total = total + user_first.sum(1) + item_first.sum(1) + number * net.linear.numbers.weight[0, 0]
    return total


@pytest.mark.parametrize("lengths", [None, [2, 0, 1, 3, 1]])
@pytest.mark.parametrize("network", SMALL)
def test_a_network_is_its_formula_and_the_loss_their_cross_entropy(network, lengths):
    model, given = build(network), batch(lengths=lengths)
    if network in ("dat", "inttower"):
        key = "mimic" if network == "dat" else "cir"
        model = build(network, model={"network": {key: 0.0}})
    logits_S = expected(model, network, given)
    loss = loss_of(model, given)
    wanted = F.binary_cross_entropy_with_logits(logits_S, given.columns["label"].double(), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("network", SMALL)
def test_gradients_agree_with_finite_differences(network):
    # what DAT's mimic loss holds still has no gradient, and would have a slope
    model = build(network, model={"l2": 0.01, "network": {"mimic": 0.0} if network == "dat" else {}})
    for parameter in model.parameters():  # steps of a difference stay on one side of every ReLU and maximum
        parameter.data *= 0.7
    given = batch(seed=4)
    # A constant before a BatchNorm changes nothing: its bias has no gradient but for rounding.
    for name, parameter in model.named_parameters():
        if ".linears." in name and name.endswith("bias") and "towers" in name:
            parameter.requires_grad_(False)
    trained = {n: p for n, p in model.named_dense() if p.requires_grad}
    model.named_dense = lambda: iter(trained.items())
    assert_slopes(model, lambda: loss_of(model, given), 1e-12, step=1e-7)


def test_l2_counts_what_is_looked_up_as_often_as_it_is():
    plain, given = build("deepfm"), batch()
    with_l2 = build("deepfm", model={"l2": 0.5})
    squares = 0.0
    for name in ("user", "age", "item", "genres"):
        table = plain.tables[name]
        rows = {
            "user": given.columns["user"],
            "age": given.user_columns["age"],
            "item": given.items_T,
            "genres": genres_of(given.items_T.tolist()),
        }[name]
        squares = squares + table.weight[rows].square().sum() + table.bias[rows].square().sum()
    torch.testing.assert_close(loss_of(with_l2, given) - loss_of(plain, given), 0.5 * squares)


def test_mimic_loss_draws_augmented_vectors_to_the_other_sides_tops_and_holds_these_still():
    model, given = build("dat", model={"network": {"mimic": 0.3}}), batch()
    plain = build("dat", model={"network": {"mimic": 0.0}})
    net, flats = model.network, {}
    user, item, _, _, number = sides(model, given)
    own = {s: model.tables[f"augmented-{s}"].weight[given.columns[s]] for s in ("user", "item")}
    flats["user"] = torch.cat([user.flatten(1), own["user"]], 1)
    flats["item"] = torch.cat([item.flatten(1), number[:, None], own["item"]], 1)
    tops = {side: mlp(net.towers[side], flat, True) for side, flat in flats.items()}
    liked = given.columns["label"] == 1
    far = (own["user"] - tops["item"]).square().mean(1) + (own["item"] - tops["user"]).square().mean(1)
    torch.testing.assert_close(loss_of(model, given) - loss_of(plain, given), 0.3 * far[liked].sum())
    loss_of(model, given).backward()
    loss_of(plain, given).backward()
    for own, other in zip(net.towers.parameters(), plain.network.towers.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_cir_is_the_infonce_of_likes_against_what_their_users_did_not_like():
    model, given = build(model={"network": {"cir": 0.7, "temperature": 0.5}}), batch(rows=17, seed=2)
    plain = build(model={"network": {"cir": 0.0}})
    side = {}
    for name in ("user", "item"):
        part = model.supervise(model.prepare(given), 1)
        views = model.views([part], StepContext(0))
        looked = model.looked(name, getattr(part, name), views)
        side[name] = F.normalize(model.network._layers(name, looked, 0)[0][-1], dim=1)
    users, items, labels = (given.columns[n].tolist() for n in ("user", "item", "label"))
    total = 0.0
    for n in range(17):
        if not labels[n]:
            continue
        kept = [
            m for m in range(17) if not (items[m] == items[n] or (users[m] == users[n] and labels[m] == 1))
        ]
        scores = torch.stack([side["user"][n] @ side["item"][m] / 0.5 for m in [n, *kept]])
        total = total - torch.log_softmax(scores, 0)[0]
    torch.testing.assert_close(loss_of(model, given) - loss_of(plain, given), 0.7 * total)


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_batch_norm_is_torchs_however_it_is_computed(rows):
    ours, torchs = BatchNorm(5, Axis()).double(), torch.nn.BatchNorm1d(5, EPS, MOMENTUM).double()
    with torch.no_grad():
        for own, theirs in ((ours.weight, torchs.weight), (ours.bias, torchs.bias)):
            theirs.copy_(torch.randn(5, generator=generator(1), dtype=torch.float64))
            own.copy_(theirs)
    x = torch.randn(rows, 5, generator=generator(2), dtype=torch.float64, requires_grad=True)
    if rows > 1:
        found = [ours(x), torchs(x)]
        torch.testing.assert_close(*found)
        before = ours.running_var.clone()
        # by hand, as several processes do it
        alone = BatchNorm(5, SimpleNamespace(size=2, sum=lambda v: v, rank=0, add_up=lambda t: t)).double()
        alone.load_state_dict(
            {**ours.state_dict(), "running_mean": torch.zeros(5), "running_var": torch.ones(5)}
        )
        by_hand = alone(x)
        torch.testing.assert_close(by_hand, found[1])
        torch.testing.assert_close(alone.running_var, torchs.running_var)
        torch.testing.assert_close(before, torchs.running_var)
        slopes = [torch.autograd.grad((y * y.detach().sin()).sum(), x)[0] for y in (by_hand, found[1])]
        torch.testing.assert_close(*slopes)
    else:
        torch.testing.assert_close(
            ours(x), ours.bias.expand(1, 5)
        )  # no variance of one row is divided by zero
        assert ours.running_var.isfinite().all()
    torch.testing.assert_close(ours.eval()(x).shape, x.shape)


def test_evaluation_and_training_give_the_same_logits_where_nothing_is_normalised():
    model, given = build("deepfm"), batch()
    logits_B1 = model.logits(given)
    assert logits_B1.shape == (11, 1) and logits_B1.dtype == torch.float32 and model.training
    torch.testing.assert_close(
        logits_B1[:, 0].double(), expected(model, "deepfm", given), rtol=1e-6, atol=1e-6
    )
    companions = batch(lengths=[1] * 5)
    alone = model.logits(companions.slice(2, 3))
    torch.testing.assert_close(model.logits(companions)[2:3], alone, rtol=0, atol=0)


@pytest.mark.parametrize("network", ["dssm", "dat", "inttower"])
def test_towers_read_the_rows_of_an_evaluation_that_differ_once(network, monkeypatch):
    model, given = build(network), batch(rows=40)
    whole, read = model.logits(given), {}
    alone = torch.cat([model.logits(given.slice(n, n + 1)) for n in range(40)])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)  # float32 of float64
    for side, tower in model.network.towers.items():
        found = tower.layers
        monkeypatch.setattr(
            tower, "layers", lambda x, key, s=side, f=found: read.update({s: x.detach()}) or f(x, key)
        )
    model.logits(given)
    users = torch.stack([given.columns["user"], given.user_columns["age"]], 1).unique(dim=0)
    assert len(read["user"]) == len(users) < 40
    loss_of(model, given)
    assert len(read["user"]) == len(read["item"]) == 40


def test_products_of_all_pairs_of_fields():
    x = torch.randn(5, 6, 3, generator=generator(1), dtype=torch.float64)
    pairs = sum((x[:, i] * x[:, j]).sum(1) for i in range(6) for j in range(i))
    torch.testing.assert_close(factorised(x)[:, 0], pairs)


@pytest.mark.parametrize("network", SMALL)
def test_nobody_to_judge_gives_zero_and_every_parameter_a_gradient(network):
    model = build(network)
    loss = loss_of(model, batch().slice(0, 0))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for _, p in model.named_dense())
    assert model.logits(batch().slice(0, 0)).shape == (0, 1)


def refused(**sections):
    with pytest.raises(UserError) as refusal:
        build(**sections)
    return str(refusal.value)


def test_what_does_not_fit_the_dataset_is_one_sentence():
    users = {"fields": {"user": {"column": "usr", "rows": 9}}}
    assert "model.user.fields.user.column' is 'usr', which is no column" in refused(model={"user": users})
    assert "did you mean 'mean'" in refused(model={"item": {"numbers": ["maen"]}})
    assert "that column holds text" in refused(model={"item": {"numbers": ["title"]}})
    both = {"fields": {"item": {"column": "user", "rows": 9}}}
    assert "both have a field 'item'" in refused(model={"user": both})
    assert "model.network.user_field' is 'who'" in refused(model={"network": {"user_field": "who"}})
    assert "no field of model.item" in refused(network="dat", model={"network": {"item_field": "film"}})
    assert "the towers have 3 layers" in refused(model={"network": {"layers": 4}})
    known = {"numbers": ["label"], "fields": {"user": {"column": "user", "rows": USERS}}}
    assert "'model.user.numbers' tells a prediction column 'label'" in refused(model={"user": known})
    told = {"fields": {"user": {"column": "user", "rows": USERS}, "liked": {"column": "label", "rows": 2}}}
    assert "'model.user.fields.liked' tells a prediction column 'label'" in refused(model={"user": told})
    text = {"fields": {"item": "item", "title": {"column": "title", "rows": 9}}}
    assert refused(model={"item": text}).endswith("holds text: choose a column of integers")
    many = {"fields": {"user": {"column": "user", "rows": USERS}, "tags": {"column": "tags", "rows": 9}}}
    listed = refused(model={"user": many, "network": {"user_field": "tags"}})
    assert (
        "'model.network.user_field' is 'tags', which is no field of model.user with one value each" in listed
    )
    assert "item_field' is 'genres'" in refused(network="dat", model={"network": {"item_field": "genres"}})
    assert "model.network.heads' is 3, and its heads share the 4 numbers" in refused(
        network="autoint", model={"network": {"heads": 3}}
    )
    two = {"like": {"column": "label", "any_of": [1]}, "love": {"column": "label", "any_of": [0]}}
    assert "model.tasks" in refused(model={"tasks": two})


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"catalogue": "genres"}, r"'model\.user\.fields\.more' is known of an item: give it to model\.item"),
        ("item", r"'model\.user\.fields\.more' is known of an item"),
        ({"derived": "user"}, "'more' is a user's row of the dataset, which a request doesn't know"),
        ({"column": "age", "rows": 3, "of_request": True}, "'more' says of_request"),
    ],
)
def test_what_no_request_could_say_of_a_user_is_refused_with_the_config(field, sentence):
    with pytest.raises(UserError, match=sentence):
        run_config(model={"user": {"fields": {"user": {"column": "user", "rows": USERS}, "more": field}}})


def test_bad_values_of_a_batch_are_one_sentence():
    model, given = build(), batch()

    def sentence(**columns):
        with pytest.raises(UserError) as refusal:
            model.prepare(given.with_columns(**columns))
        return str(refusal.value)

    labels = given.columns["label"].clone()
    labels[3] = 2
    assert "column 'label' holds 2" in sentence(label=labels)
    users = given.columns["user"].clone()
    users[1] = USERS
    unseen = sentence(user=users)
    assert f"column 'user' holds {USERS}, and its table has rows for 0 to {USERS - 1}" in unseen
    assert "model.user.fields.user.rows" in unseen
    means = given.columns["mean"].clone()
    means[0] = torch.nan
    assert "column 'mean' holds nan" in sentence(mean=means)
    items = given.items_T.clone()
    items[-1] = UNKNOWN
    with pytest.raises(UserError, match="judges given items"):
        model.logits(given.with_columns(item=items))
    # a row without an impression, which would have the answer of the row before it
    without = replace(
        given,
        offsets_B1=torch.cat([given.offsets_B1, given.offsets_B1[-1:]]),
        ordinals_B=torch.arange(given.sequences + 1),
        lengths=(*given.lengths, 0),
    )
    with pytest.raises(UserError, match="judges given items"):
        model.logits(without)


def test_a_share_in_pieces_is_refused_where_all_of_it_is_normalised():
    model, given = build(), batch()
    parts = [model.supervise(model.prepare(given.slice(*cut)), 1) for cut in ((0, 5), (5, 11))]
    with pytest.raises(UserError, match=r"raise train\.micro_batch_actions"):
        model.views(parts, StepContext(0))
    assert not build("dcn").network.whole_batches


def test_every_registered_network_is_tested_here():
    assert set(SMALL) == set(registry.NETWORKS)
