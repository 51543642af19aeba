"""Vectors whose first numbers are vectors too."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.embeddings.local import LocalTable
from gr.embeddings.table import TableSpec
from gr.errors import UserError
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train import job
from gr.train.comparison import compare, to_json
from gr.train.exporting import export
from gr.train.parts import build
from gr.train.recommend import recommend, write_item_vectors
from gr.train.runs import open_run
from tests.end_to_end.tiny import CONFIG, make_dataset

CPU = Processes(torch.device("cpu"))
OBJECTIVES = [
    "{name: sampled_softmax, negatives: 8, shared: true}",
    "{name: sampled_softmax, negatives: 8}",
    "full_softmax",
    "in_batch",
    "{name: bce, negatives: 2}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("matryoshka")
    make_dataset(path / "data")
    return path


def load(folder, run, *overrides):
    file = folder / f"{run}.yaml"
    file.write_text(CONFIG.format(run=folder / run, data=folder / "data"))
    return configs.load(file, ["model.similarity.matryoshka=[4, 8]", "train.max_steps=2", *overrides])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("normalize", ["true", "false"])
def test_the_loss_is_the_mean_of_those_of_the_prefixes(folder, objective, normalize):
    """Of a table and queries cut to each, in float64, and so are the gradients."""
    config = load(folder, "loss", f"objective={objective}", f"model.similarity.normalize={normalize}")
    model = build(config, CPU).model.double()
    batch = next(build(config, CPU).batches.epoch(0)).share
    part = model.supervise(batch, 7)
    step = StepContext(7, candidates_G=part.targets_S)

    def loss(objective, weight_ID, queries_SD):
        table = LocalTable(LocalTable.Config(), TableSpec("items", *weight_ID.shape, 0.0, 0))
        table.weight = torch.nn.Parameter(weight_ID)
        views = {"items": table.view([])}
        return objective(queries_SD, part, replace(step, views=views), table), table

    def objective_with(matryoshka):
        section = config.model.similarity.model_copy(update={"matryoshka": matryoshka})
        return config.objective.build(Similarity(section), build(config, CPU).data.catalogue)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    queries = torch.randn(part.count, 16, generator=generator, dtype=torch.float64)
    found, table = loss(objective_with([4, 8]), weight, q := queries.clone().requires_grad_())
    found.backward()
    wanted, grads = 0.0, torch.zeros(60, 16, dtype=torch.float64)
    of_queries = torch.zeros_like(queries)
    for dim in (4, 8, 16):
        cut = queries[:, :dim].clone().requires_grad_()
        one, small = loss(objective_with([]), weight[:, :dim].clone(), cut)
        (one / 3).backward()
        wanted += one.item() / 3
        grads[:, :dim] += small.weight.grad
        of_queries[:, :dim] += cut.grad
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(table.weight.grad, grads, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.grad, of_queries, rtol=1e-5, atol=1e-6)


def test_a_run_is_evaluated_and_recommends_at_any_of_its_lengths(folder):
    result = job.run(load(folder, "run"))
    export(result.path, folder / "exported")
    found = {}
    for dim in (4, 8, 16):
        for place in (result.path, folder / "exported"):
            run = open_run(place, dim=dim)
            files = [folder / f"{name}-{dim}.parquet" for name in ("recs", "users", "items")]
            recommend(run, files[0], k=60, exclude="none", user_vectors=files[1])
            write_item_vectors(run, files[2])
            recs, users, items = map(pq.read_table, files)
            vectors = [np.array(table["vector"].to_pylist()) for table in (users, items)]
            assert all(v.shape[1] == dim for v in vectors)
            place_of = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
            scores = vectors[0] @ vectors[1].T
            for user, row in enumerate(recs.to_pylist()[:9]):
                own = scores[user][[place_of[item] for item in row["item_ids"]]]
                np.testing.assert_allclose(row["scores"], own, rtol=1e-4, atol=1e-4)
        done = compare(str(result.path), dim=dim)
        assert json.loads(to_json(done))["dim"] == dim
        found[dim] = done.results["hstu"].metrics["ndcg@10"]
    assert len(set(found.values())) == 3
    assert found[16] == result.evaluation("test")["ndcg@10"]


def test_a_length_that_was_not_trained_is_refused(folder):
    result = job.run(load(folder, "other"))
    with pytest.raises(UserError, match=r"were trained of 4, 8, 16: choose one of these"):
        open_run(result.path, dim=5)
    plain = job.run(load(folder, "plain", "model.similarity.matryoshka=[]"))
    with pytest.raises(
        UserError, match=r"of that length alone: choose .* train with model.similarity.matryoshka"
    ):
        open_run(plain.path, dim=4)
    with pytest.raises(UserError, match="matryoshka has 16, and vectors have 16 numbers"):
        build(load(folder, "wide", "model.similarity.matryoshka=[16]"), CPU)
