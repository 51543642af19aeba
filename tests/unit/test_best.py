"""The best epoch means what was measured: the metric and the protocol that chose it stay with it, on resume too.

Rows of metrics, the patience, the final table and ``--checkpoint best`` must name the same epoch.
"""

from __future__ import annotations

import pytest

from gr.errors import UserError
from gr.train import checkpoint, job
from gr.train.cursor import Cursor
from gr.train.folder import RunFolder
from gr.train.report import final_rows
from gr.train.runs import find_checkpoint, open_run
from gr.train.selection import best_of, better, comparable

EVERY = ["eval.splits=[valid, test]", "eval.ks=[1, 10]", "checkpoint.keep=99", "checkpoint.every_steps=null"]


@pytest.fixture
def config(config):
    # a rate at which validation goes up and down
    return lambda *overrides: config(*EVERY, "optimizer.lr=0.3", *overrides)


def validations(result, **protocol):
    rows = [r for r in result.metrics if r["kind"] == "eval" and r["split"] == "valid"]
    return [r for r in rows if all(r.get(key) == value for key, value in protocol.items())]


def cursor(result) -> Cursor:
    path = checkpoint.newest(RunFolder(result.path).checkpoints)
    return Cursor(**checkpoint.read_state(path)["cursor"])


def assert_all_name(result, metric, rows):
    """Everything that speaks of the best epoch means the first of ``rows`` with the largest ``metric``."""
    best = max(rows, key=lambda r: r[metric])  # the first of equals
    last, step = cursor(result), best["step"]
    assert result.selection == metric
    assert (last.best["step"], last.best["epoch"]) == (step, best["epoch"])
    assert (last.best["metric"], last.best["value"]) == (metric, best[metric])
    assert last.best["exclude"] == best["exclude"] and last.best.get("of_users") == best.get("of_users")
    assert last.stale == len(rows) - 1 - rows.index(best)
    table = final_rows(result)
    assert table["valid, best on valid"] == best
    assert table["test, best on valid"]["step"] == step
    assert find_checkpoint(RunFolder(result.path), "best").name == f"step-{step:08d}"
    assert open_run(result.path, "best").step == step


def test_the_kept_best_says_what_it_is(config):
    result = job.run(config())
    rows = validations(result)
    assert len({r["ndcg@10"] for r in rows}) > 1
    assert_all_name(result, "ndcg@10", rows)
    assert cursor(result).best["exclude"] == "kept"


@pytest.mark.parametrize("metric", ["hr@1", "mrr"])
def test_another_metric_on_resume_judges_all_epochs_anew(config, metric, capsys):
    first = job.run(config("train.epochs=4"))
    assert_all_name(first, "ndcg@10", validations(first))
    stopping = f"train.early_stopping={{metric: {metric}, patience: 99}}"
    again = job.resume(first.path, ["train.epochs=6", stopping])
    assert f"judged otherwise than before (metric ndcg@10 -> {metric})" in capsys.readouterr().out
    assert len(validations(again)) == 6
    assert_all_name(again, metric, validations(again))


def test_another_metric_for_a_run_that_is_finished_is_kept_too(config):
    """Nothing is left to train, and yet the files must agree with the table."""
    first = job.run(config("train.epochs=4"))
    again = job.resume(first.path, ["train.early_stopping={metric: hr@1, patience: 99}"])
    assert again.metrics == first.metrics
    assert_all_name(again, "hr@1", validations(again))


def test_the_patience_counts_by_the_new_metric(config):
    first = job.run(config("train.epochs=4"))
    values = [r["hr@1"] for r in validations(first)]
    since_best = len(values) - 1 - values.index(max(values))
    patience = since_best + 1
    again = job.resume(
        first.path, ["train.epochs=30", f"train.early_stopping={{metric: hr@1, patience: {patience}}}"]
    )
    rows = validations(again)
    assert_all_name(again, "hr@1", rows)
    assert cursor(again).stale == patience and len(rows) < 30


@pytest.mark.parametrize("protocol", [{"exclude": "none"}, {"exclude": "all"}])
def test_another_exclusion_on_resume_compares_with_its_own_kind_only(config, protocol, capsys):
    first = job.run(config("train.epochs=3"))
    again = job.resume(first.path, ["train.epochs=5", f"eval.exclude={protocol['exclude']}"])
    assert f"(exclude kept -> {protocol['exclude']}): none so far can be compared" in capsys.readouterr().out
    rows = validations(again, **protocol)
    assert len(validations(again)) == 5 and len(rows) == 2
    assert_all_name(again, "ndcg@10", rows)
    back = job.resume(first.path, ["train.epochs=6", "eval.exclude=kept"])
    assert_all_name(back, "ndcg@10", validations(back, exclude="kept"))


def test_fewer_users_on_resume_are_other_figures(config):
    first = job.run(config("train.epochs=3"))
    again = job.resume(first.path, ["train.epochs=5", "eval.max_users=40"])
    rows = validations(again)[3:]
    assert {r["users"] for r in rows} == {40} and {r["of_users"] for r in rows} == {143}
    assert_all_name(again, "ndcg@10", rows)


def test_ks_without_the_old_metric_choose_by_another_one(config):
    first = job.run(config("train.epochs=3"))
    again = job.resume(first.path, ["train.epochs=5", "eval.ks=[1, 5]"])
    assert "ndcg@10" not in validations(again)[-1]
    assert_all_name(again, "mrr", validations(again))
    back = job.resume(first.path, ["train.epochs=6", "eval.ks=[10]"])
    with_metric = [r for r in validations(back) if "ndcg@10" in r]
    assert [r["epoch"] for r in with_metric] == [0, 1, 2, 5]
    assert_all_name(back, "ndcg@10", with_metric)


def test_a_best_checkpoint_that_was_pruned_before_the_metric_changed_is_said(config):
    """The epoch that another metric would have chosen may have left no checkpoint."""
    first = job.run(config("train.epochs=6", "checkpoint.keep=1"))
    saved = {step for step, _ in checkpoint.listed(RunFolder(first.path).checkpoints)}
    gone = [r for r in validations(first) if r["step"] not in saved]
    metric = next(m for m in ("hr@1", "hr@10", "mrr", "ndcg@1") if _best(first, m) in gone)
    again = job.resume(first.path, [f"train.early_stopping={{metric: {metric}, patience: 99}}"])
    step = _best(again, metric)["step"]
    with pytest.raises(UserError) as refusal:
        find_checkpoint(RunFolder(first.path), "best")
    kept = ", ".join(str(s) for s, _ in checkpoint.listed(RunFolder(first.path).checkpoints))
    assert str(refusal.value) == (
        f"run '{first.path}' is best at step {step} (by {metric}), of which no checkpoint was kept: choose one of "
        f"{kept}"
    )


def _best(result, metric):
    return max(validations(result), key=lambda r: r[metric])


def test_losses_are_better_when_lower_and_figures_of_another_kind_are_no_figures():
    assert better("log_loss/click", 0.1, 0.2) and not better("log_loss", 0.2, 0.2)
    assert better("loss", 0.1, 0.2) and not better("loss", 0.3, 0.2)
    assert better("auc", 0.2, 0.1) and not better("ndcg@10", 0.1, 0.1)
    row = {"epoch": 1, "step": 9, "ndcg@10": 0.5, "mrr": 0.4, "exclude": "kept"}
    best = best_of(row, "ndcg@10")
    assert best == {"epoch": 1, "step": 9, "value": 0.5, "metric": "ndcg@10", "exclude": "kept"}
    assert comparable(best, row, "ndcg@10") and not comparable(best, row, "mrr")
    assert not comparable(best, {**row, "exclude": "none"}, "ndcg@10")
    assert not comparable(best, {**row, "of_users": 5}, "ndcg@10")
    assert not comparable({}, row, "ndcg@10")
