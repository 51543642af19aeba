"""The data side's report judges what its benchmarks wrote."""

import json

from benchmarks.data.run import HERE, PARTS, file_of, verdicts


def part(actions: int, seconds: float) -> dict:
    return {"actions": actions, "core_seconds": seconds}


def loaded(actions: int, seconds: float, peak: int) -> dict:
    slow, bare = part(actions, 100.0), part(actions, 1.0)
    first = {"bare": bare, "engine": slow}  # the first epoch also verifies: it stands apart
    rounds = [first, *({"bare": bare, "engine": part(actions, seconds)} for _ in range(3))]
    return {
        "shape": "long",
        "engine": "arrow",
        "actions": actions,
        "rounds": rounds,
        "peak_bytes": peak << 20,
    }


def test_each_figure_is_set_beside_what_is_required(tmp_path):
    made = {
        "loader": {"rows": [loaded(20_000_000, 1.25, 400), loaded(30_000_000, 2.5, 450)]},
        "prepare": {
            "rows": [
                {"log_actions": 10**7, "engine": "process", "seconds": 4.0, "peak_bytes": 1},
                {"log_actions": 10**7, "engine": "ray", "seconds": 10.0, "peak_bytes": 600 << 20},
            ]
        },
        "object_store": {
            "results": [
                {"latency_ms": 20.0, "way": way, "mib_per_s": speed}
                for way, speed in {
                    "pyarrow, one at a time": 10,
                    "gr, one at a time": 7,
                    "pyarrow, 8 threads": 40,
                    "gr, 8 ahead": 36,
                    "gr, 8 ahead, checked and decoded": 1,
                }.items()
            ]
        },
        "wait": {"rows": [{"engine": "arrow", "share": 0.019}, {"engine": "ray", "share": 0.021}]},
    }
    for name, result in made.items():
        file_of(name, tmp_path).write_text(json.dumps(result))
    found = {one.what: (one.measured, one.reached) for one in verdicts({"kills": 0, "shuffle": 1}, tmp_path)}
    of_store = "S3, 20 ms a request, {}: of pyarrow's own reading"
    assert found == {
        "loader, long, 20,000,000 actions: actions/s of a core": ("16,000,000", True),
        "loader, long, 20,000,000 actions: of bare pyarrow": ("0.80", True),
        "loader, long, 30,000,000 actions: actions/s of a core": ("12,000,000", False),
        "loader, long, 30,000,000 actions: of bare pyarrow": ("0.40", False),
        "loader, long: memory, smallest to largest": ("400 to 450 MiB, +12.5%", False),
        "prepare, 10,000,000 actions: actions/s in process": ("2,500,000", True),
        "prepare, 10,000,000 actions: Ray's speed, of that": ("0.40", False),
        "prepare, 10,000,000 actions: memory of all of Ray's processes": ("600 MiB", True),
        of_store.format("one at a time"): ("0.70", False),
        of_store.format("eight at a time"): ("0.90", True),
        "waiting for data, arrow: of steps": ("1.90%", True),
        "waiting for data, ray: of steps": ("2.10%", False),
        "shuffle": ("failed", False),
        PARTS["kills"].proves: ("holds", True),
    }


def test_what_was_proved_before_is_kept_and_ray_is_judged_by_the_largest_log(tmp_path):
    proved = {"what": PARTS["kills"].proves, "required": "holds", "measured": "holds", "reached": True}
    (tmp_path / "data.json").write_text(json.dumps([proved]))
    rows = [
        {"log_actions": actions, "engine": engine, "seconds": seconds, "peak_bytes": 1}
        for actions in (10**7, 10**8)
        for engine, seconds in (("process", 4.0), ("ray", 10.0))
    ]
    file_of("prepare", tmp_path).write_text(json.dumps({"rows": rows}))
    found = {one.what: (one.required, one.reached) for one in verdicts({"prepare": 0}, tmp_path)}
    assert found[PARTS["kills"].proves] == ("holds", True)
    speeds = [said for what, said in found.items() if "Ray's speed" in what]
    assert speeds == [("stated", True), ("at least 0.50", False)]


def test_every_part_is_a_program_that_is_there():
    assert all((HERE / one.program[0]).is_file() for one in PARTS.values() if not one.proves)
