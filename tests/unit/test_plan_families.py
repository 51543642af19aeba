"""Models whose steps hang on numbers, planned on paper: operations and memory of a step that is really taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.planned_memory import measured_peak
from gr import config as configs
from gr.models.step import StepContext
from gr.processes import Processes
from gr.scaling.machine import cpu
from gr.scaling.plan import Planner
from gr.scaling.rehearsal import Paper
from gr.train.parts import build
from gr.train.planning import OfDataset
from tests.unit import test_models_two_tower as two_tower
from tests.unit.models_common import batch
from tests.unit.test_flops_families import retrieval

pytest.importorskip("torchrec")


def counted(model, given):
    """Operations of a real step, as torch counts them."""
    part, context = model.supervise(model.prepare(given), 5), StepContext(5)
    context = dataclasses.replace(context, views=model.views([part], context))
    with FlopCounterMode(display=False) as counter:
        model(part, context).backward()
    return counter.get_total_flops()


def rehearsed(config, catalogue, given, processes=1):
    paper = Paper(config, catalogue, cpu(1).cluster(processes))
    return paper.rehearse(given)


def test_a_recurrent_encoder_is_unrolled_on_paper_as_it_runs():
    config, model = retrieval({"name": "gru4rec", "layers": 2, "hidden": 24})
    config = configs.override(config, ["objective=bce"])

    class Catalogue:
        rows, manifest, column_names = 40, None, ()
        training_counts = torch.ones(40, dtype=torch.int64)

    model = config.model.build(config, Catalogue(), Processes(torch.device("cpu")))
    given = batch((9, 1, 0, 12, 5))
    found = sum(operation.flops for operation in rehearsed(config, Catalogue(), given).operations)
    assert found == pytest.approx(counted(model.train(), given), rel=0.02)


def test_its_memory_is_what_it_takes(config):
    encoder = "model.encoder={name: gru4rec, layers: 2, hidden: 48}"
    run = config("model.dim=64", "train.global_batch=64", encoder)
    processes = Processes(torch.device("cpu"))
    parts = build(run, processes)
    planned = Planner(run, OfDataset(parts.data), cpu(1)).plan(run, 1, {})
    assert measured_peak(run, parts, processes) == pytest.approx(planned.memory.peak, rel=0.1)


def test_a_contrast_of_liked_impressions_has_those_of_the_batch():
    run, given = two_tower.run_config("inttower"), two_tower.batch(64)
    likes = int((given.columns["label"] == 1).sum())
    assert 0 < likes < 64
    model = run.model.build(run, two_tower.CATALOGUE, Processes(torch.device("cpu")))
    alone = rehearsed(run, two_tower.CATALOGUE, given)
    found = sum(operation.flops for operation in alone.operations)
    assert found == pytest.approx(counted(model.train(), given), rel=0.02)
    assert not alone.exchanged


def test_it_is_with_the_items_of_all_processes():
    run, given = two_tower.run_config("inttower"), two_tower.batch(64)
    likes, width = int((given.columns["label"] == 1).sum()), 4
    one, four = (rehearsed(run, two_tower.CATALOGUE, given, processes) for processes in (1, 4))
    more = sum(o.flops for o in four.operations) - sum(o.flops for o in one.operations)
    assert more == 3 * 2 * likes * (3 * 64) * width, "scores, and their gradients by likes and by items"
    rows = 64 * (4 * width + 2 * 8)  # the items' tops; which item, and who likes it
    assert four.exchanged["rows of layers"] == 3 * rows
    assert four.exchanged["sums of layers"] > 2 * 3 / 4 * 4 * 64 * width
