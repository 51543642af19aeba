"""Run folders: no run takes another's, and what a crash leaves behind is put right."""

import os
from multiprocessing import get_context

import pytest

from gr import config as configs
from gr.errors import UserError
from gr.train.folder import RunFolder, append_rows

MINIMAL = {
    "data": {"path": "data"},
    "model": {"encoder": "hstu"},
    "objective": "sampled_softmax",
    "optimizer": "adamw",
}


def config(**run):
    return configs.from_dict({**MINIMAL, "run": run})


def make(**run):
    return RunFolder.make(config(**run), "a: 1\n", {"python": "3"})


def make_in(folder, barrier, queue):
    os.chdir(folder)
    barrier.wait()
    queue.put(str(make(name="same").path))


def test_runs_that_choose_a_name_at_the_same_moment_get_folders_of_their_own(tmp_path):
    context, count = get_context("fork"), 8
    barrier, queue = context.Barrier(count), context.Queue()
    processes = [context.Process(target=make_in, args=(tmp_path, barrier, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    paths = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(paths)) == count
    assert "runs/same" in paths and "runs/same-2" in paths


def test_run_dir_is_made_with_its_parents_and_taken_once(tmp_path):
    folder = make(dir=str(tmp_path / "not" / "there" / "yet"))
    assert folder.config.read_text() == "a: 1\n"
    with pytest.raises(UserError, match=f"'{folder.path}' already holds a run: continue it with --resume"):
        make(dir=str(folder.path))
    (tmp_path / "mine").mkdir()
    assert make(dir=str(tmp_path / "mine")).config.is_file()  # an empty folder is free


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not empty"):
        make(dir=str(tmp_path / "full"))
    with pytest.raises(UserError, match="is a file"):
        make(dir=str(tmp_path / "full" / "thesis.tex"))
    with pytest.raises(UserError, match=r"cannot write a run to .*choose another run\.dir"):
        make(dir=str(tmp_path / "full" / "thesis.tex" / "below"))


def test_cutting_keeps_whole_rows_only(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.cut_metrics(3) == 0  # nothing was logged yet
    rows = [{"kind": "train", "step": step} for step in range(5)]
    append_rows(folder.metrics, rows)
    append_rows(folder.timing, rows)
    for file in (folder.metrics, folder.timing):
        file.write_text(file.read_text()[:-4])
    assert folder.read_metrics() == rows[:4]
    assert folder.cut_metrics(9) == 4
    append_rows(folder.metrics, rows[4:])
    append_rows(folder.timing, rows[4:])
    assert folder.read_metrics() == rows
    assert folder.timing.read_text() == folder.metrics.read_text()
    assert folder.cut_metrics(2) == 2
    assert folder.read_metrics() == rows[:2]
    assert len(folder.timing.read_text().splitlines()) == 5


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(UserError, match="another process is training in"):
        with folder.locked():
            pass
    with folder.locked():
        pass
