"""The benchmark of steps that are shared out: its meter counts what it says, and it runs from end to end."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks.training import scaling
from benchmarks.training.cases import Case, cases
from benchmarks.training.exchanges import Meter, alone, exposed_seconds, must_cross
from gr.embeddings.row_updates import Piece
from gr.processes import processes
from tests.distributed.group import in_group
from tests.packages import needs

needs("torchrec", "deepspeed")

LATE = 0.3


def metered() -> dict:
    meter = Meter()
    with processes("cpu", threads=1) as joined, meter.running():
        rank = joined.world.rank
        joined.barrier()
        meter.read()
        if rank == 0:
            time.sleep(LATE)
        joined.world.add_up(torch.ones(3))
        waited, nothing = meter.read()
        # float64: rank r keeps r + 1 rows of 5 and sends r + 2 (ids of its counts beside them: one int64)
        joined.world.exchange(
            torch.ones(2 * rank + 3, 5, dtype=torch.float64), [rank + 1 + (rank != r) for r in (0, 1)]
        )
        _, sent = meter.read()
        unwatched = dist.all_to_all_single
    assert dist.all_to_all_single is not unwatched
    return {"waited": waited, "nothing": nothing, "sent": sent}


def test_waits_and_bytes_that_leave_a_process_are_counted(tmp_path):
    first, second = in_group(metered, 2, tmp_path / "metered", by_hand=False)
    assert second["waited"] > LATE / 2 > 10 * first["waited"], "who comes late waits for nobody"
    assert first["nothing"] == second["nothing"] == 0
    assert [first["sent"], second["sent"]] == [8 + 8 * 5 * 2, 8 + 8 * 5 * 3]


def test_the_least_that_a_view_moves_is_what_a_process_does_not_own():
    own = [Piece("weight", 10, 0, torch.zeros(5, 4)), Piece("bias", 10, 0, torch.zeros(5, 1))]
    table = SimpleNamespace(pieces=lambda: own, dim=8, spec=SimpleNamespace(bias=True))
    rows_U = torch.tensor([3, 10, 14, 15, 99])  # of two of them half of the columns and the bias are here
    assert must_cross(table, rows_U) == 2 * 4 * (5 * 9 - 2 * 5)


def test_exposed_is_what_no_kernel_hides():
    assert alone([(0, 10)], [(2, 3), (2.5, 4), (9, 20)]) == 7
    assert alone([(0, 1), (0.5, 2)], []) == 2 and alone([], [(0, 1)]) == 0
    device = torch.autograd.DeviceType
    events = [
        ("ncclDevKernel_SendRecv", device.CUDA, 0, 100),
        ("sgemm", device.CUDA, 50, 80),
        ("nccl:all_to_all", device.CPU, 0, 10**6),
    ]
    profile = SimpleNamespace(
        events=lambda: [
            SimpleNamespace(name=n, device_type=d, time_range=SimpleNamespace(start=a, end=b))
            for n, d, a, b in events
        ]
    )
    assert exposed_seconds(profile) == pytest.approx(70e-6)


def test_cases_are_every_table_and_every_engine_once():
    tables, engines = ["local", "row_wise", "column_wise"], ["ddp", "zero1", "fsdp"]
    names = [case.name for case in cases(tables, engines, False, 4)]
    assert names == ["local, ddp", "row_wise, ddp", "column_wise, ddp", "row_wise, zero1", "row_wise, fsdp"]
    assert Case("column_wise", "ddp") not in cases(tables, engines, True, 1), "one process has one sharding"
    assert len(cases(tables, engines, True, 2)) == 9
    assert [c.table for c in cases(["row_wise"], engines, False, 2)] == ["row_wise"] * 3


def test_the_benchmark_runs_from_end_to_end(tmp_path, monkeypatch, capfd):
    """Two processes as the program starts them; one is forked, which spares its imports."""
    start, file = scaling.in_group, tmp_path / "quick.json"

    def started(count: int, arguments: list[str]) -> dict:
        if count > 1:
            return start(count, arguments)
        alone = tmp_path / "alone.json"
        in_group(
            scaling.main, 1, tmp_path / "one", [*arguments, "--member", "--json", str(alone)], by_hand=False
        )
        return json.loads(alone.read_text())

    monkeypatch.setattr(scaling, "in_group", started)
    chosen = ["--tables", "local", "row_wise", "--engines", "ddp", "--set", "model.table_std=0.1"]
    assert scaling.main(["--quick", "--device", "cpu", "--threads", "1", "--json", str(file), *chosen]) == 0
    printed = capfd.readouterr().out
    record = json.loads(file.read_text())
    assert file.with_suffix(".png").stat().st_size > 0 and "Work.wait" in record["method"]
    one, two = record["results"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for result in (one, two):
        assert f"{result['processes']} processes" in printed
        assert list(result["cases"]) == ["local, ddp", "row_wise, ddp"] and result["rounds"] >= 3
        for case in result["cases"].values():
            assert case["samples_per_s"][1] > 0 and min(case["added_mib"]) >= 0
            assert len(case["step_s"]) == result["rounds"] and len(case["peak_mib"]) == result["processes"]
    rows = 4 * 8  # float32, eight wide
    assert one["cases"]["row_wise, ddp"]["table_bytes"] == [300 * rows]
    here = two["cases"]["row_wise, ddp"]
    assert here["table_bytes"] == [150 * rows] * 2 and here["moment_bytes"] == [2 * 150 * rows] * 2
    assert two["cases"]["local, ddp"]["moment_bytes"] == [2 * 300 * rows] * 2
    # ids are eight bytes beside two times 32, and how many there are of each
    assert 1 < here["view_sent_bytes"] / here["view_least_bytes"] < 1.3
    assert two["cases"]["local, ddp"]["view_least_bytes"] == 0 < here["exposed_ms"] < here["step_ms"]
