"""The kernel benchmark: its files, its gate, its report. Nothing here looks at how long anything took."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.kernels import (
    gates,
    markdown,
    memory,
    must_reach,
    operators,
    padding,
    report,
    run,
    sanitizer,
    shapes,
    shares,
    suite,
    timing,
)
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.measure import Settings, measure_case
from benchmarks.kernels.problem import PASSES, Case, Operator, Step, Way, gradients
from benchmarks.training import scaling
from gr.errors import UserError
from gr_kernels import native

CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e10, "bfloat16": 1e10}, 1e9)
QUICK = Settings(rounds=1, memory=False)
# What runs anywhere in a moment. (Triton's interpreter, which these tests have switched on, doesn't.)
OURS = {
    "hstu_attention": ["cpp"] if native.available() else ["none"],
    "block": ["fused", "fused-keep", "unfused"],
    "cross_entropy": ["chunked"],
    "sampled_softmax": ["scores"],
    "candidate_scores": ["gather", "dense"],
    "log_partition": ["chunked"],
    "jagged": ["reference"],
    "bias_table_gradient": ["cpp"] if native.available() else ["none"],
}


def command(operator: str, out: Path, *more: str) -> list[str]:
    options = ["--device", "cpu", "--grid", "tiny", "--rounds", "2", "--seconds", "0.1", "--no-memory"]
    return [operator, *options, "--ours", *OURS[operator], "--out", str(out), *more]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every operator."""
    folder = tmp_path_factory.mktemp("results")
    for operator in operators.NAMES:
        assert run.main(command(operator, folder)) == 0
    return folder


@pytest.mark.parametrize("operator", operators.NAMES)
def test_every_way_that_runs_is_right_and_has_figures(results: Path, operator: str) -> None:
    found = json.loads((results / f"{operator}.json").read_text())
    assert found["operator"] == operator and found["environment"]["torch"] == torch.__version__
    assert found["ceilings"]["matmul_tflops"]["float32"] > 0 and found["ceilings"]["copy_gb_per_s"] > 0
    for case in found["cases"]:
        timed = {way["way"]: way for way in case["ways"] if "both" in way}
        assert {*OURS[operator], "eager"} - {"none"} <= set(timed), [way["why"] for way in case["ways"]]
        for way in case["ways"]:
            assert not way["red"], way["why"]
            assert ("both" in way) != bool(way["why"])  # figures, or a reason for none
        passes = ("forward", "both") if operator == "bias_table_gradient" else PASSES
        for way in timed.values():
            judged = way["way"] != "products-only" and "no gate" not in way["note"]
            assert (len(way["relative_errors"]) >= len(passes) - 1) == judged
            assert [which for which in PASSES if which in way] == list(passes)
            for which in passes:
                figures = way[which]
                assert 0 < figures["ms_p10"] <= figures["ms_p50"] <= figures["ms_p90"]
                assert figures["tflops"] == pytest.approx(
                    case["flops"][which] / figures["ms_p50"] / 1e9, rel=1e-4
                )
                assert figures["gb_per_s"] == pytest.approx(
                    case["bytes"][which] / figures["ms_p50"] / 1e6, rel=1e-4
                )
                assert set(figures["speedup_over"]) == set(timed) - {way["way"]}
    assert (results / f"{operator}.png").read_bytes().startswith(b"\x89PNG")


def test_csv_grows_from_run_to_run(results: Path, tmp_path: Path) -> None:
    with (results / "kernels.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["operator"] for row in rows} == set(operators.NAMES)
    for row in rows:
        assert row["commit"] is not None and row["torch"] == torch.__version__ and row["command"]
        assert bool(row["ms_p50"]) != bool(row["why"])
    for _ in range(2):
        assert run.main(command("candidate_scores", tmp_path, "--against", "none")) == 0
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 * len(OURS["candidate_scores"])  # a head; two runs, three passes
    (tmp_path / "kernels.csv").write_text("another,head\n")
    assert run.main(command("candidate_scores", tmp_path, "--against", "none")) == 2


@pytest.mark.parametrize("operator", operators.NAMES)
def test_the_gate_fits_sixteen_bits(operator: str) -> None:
    """On CPU what a GPU's cases go through: in bfloat16 plain PyTorch passes, a tenth too much doesn't."""
    module = operators.load(operator)
    spec = module.specs("cpu", "tiny")[0]
    inner = getattr(spec, "attention", None)
    spec = replace(
        spec, **({"dtype": "bfloat16"} if inner is None else {"attention": replace(inner, dtype="bfloat16")})
    )
    case = module.build(spec, CPU)
    way = peer(module, case, "blocked" if operator == "hstu_attention" else "eager")
    coarse = spoilt(way, "coarse", lambda out: out * 1.1)
    right, wrong = measure_case(module, case, [way, coarse], CEILINGS, QUICK)["ways"]
    assert "both" in right, right["why"]
    assert wrong["red"] and max(right["relative_errors"].values()) < 0.03


def attention() -> tuple[Operator, Case]:
    operator = operators.load("hstu_attention")
    (spec,) = operator.specs("cpu", "tiny")
    return operator, operator.build(spec, CPU)


def peer(operator: Operator, case: Case, name: str) -> Way:
    return next(way for way in operator.ways(case) if way.name == name)


def spoilt(way: Way, name: str, spoil: Any, ours: bool = False) -> Way:
    def bind(case: Case) -> Step:
        step = way.bind(case)
        return replace(step, forward=lambda: spoil(step.forward()))

    return replace(way, name=name, bind=bind, ours=ours)


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return 2 * upstream


def test_no_speed_for_a_wrong_way() -> None:
    operator, case = attention()
    blocked = peer(operator, case, "blocked")
    ways = [
        blocked,
        spoilt(blocked, "off by a thousandth", lambda out: 1.001 * out, ours=True),
        spoilt(blocked, "wrong gradient", TwiceTheGradient.apply),
        spoilt(blocked, "nan", lambda out: out.index_fill(0, torch.tensor([3]), torch.nan)),
        spoilt(blocked, "another shape", lambda out: out[:, :, :1] * torch.ones_like(out)),
    ]
    found = measure_case(operator, case, ways, CEILINGS, QUICK)
    right, *wrong = found["ways"]
    assert right["both"]["ms_p50"] > 0 and not right["red"]
    for way in wrong:
        assert way["red"] and way["why"].startswith("WRONG: ") and not set(PASSES) & set(way)
    assert wrong[0]["why"].startswith("WRONG: out") and wrong[1]["why"].startswith("WRONG: q")
    assert right["both"]["speedup_over"] == {}
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(found, on_gpu=False))
    text = console.export_text()
    assert "off by a thousandth: WRONG: out is off by 1.0e-03" in text
    assert "│ off by a thousandth" not in text and "│ blocked" in text


def test_a_wrong_way_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    operator, case = attention()
    wrong = spoilt(peer(operator, case, "blocked"), "cpp", lambda out: out + 1, ours=True)
    monkeypatch.setattr(operator, "ways", lambda case: [wrong])
    assert run.main(command("hstu_attention", tmp_path, "--ours", "cpp")) == 1


def test_a_way_that_raises_says_why() -> None:
    operator, case = attention()

    def bind(case: Case) -> Step:
        raise RuntimeError("no kernel image\nand a long trace")

    def refuse(case: Case) -> Step:
        raise ValueError("hstu_attention: implementation 'triton' can't run here: the tensors are on CPU.")

    blocked = peer(operator, case, "blocked")
    ways = [
        replace(blocked, name="broken", bind=bind),
        replace(blocked, name="ours", bind=bind, ours=True),
        replace(blocked, name="refused", bind=refuse, ours=True),
        replace(blocked, name="other device", obstacle=lambda case: "for CUDA"),
    ]
    broken, ours, refused, other = measure_case(operator, case, ways, CEILINGS, QUICK)["ways"]
    assert broken["why"] == "failed: RuntimeError: no kernel image" and not broken["red"]
    assert ours["red"]  # one of ours has no right to fail unannounced
    assert refused["why"] == "the tensors are on CPU" and not refused["red"]
    assert other["why"] == "for CUDA" and not other["red"]


def test_a_single_number_is_not_held_to_luck() -> None:
    operator = operators.load("cross_entropy")
    (spec,) = operator.specs("cpu", "tiny")
    gate = gates.build(operator, operator.build(spec, CPU), "loss")
    assert gate.allowed["out"] >= 4 * torch.finfo(torch.float32).eps
    assert gates.relative_error(torch.tensor(torch.nan), torch.tensor(1.0)) == float("inf")
    assert gates.relative_error(torch.zeros(2), torch.ones(3)) == float("inf")


def test_memory_of_a_step() -> None:
    operator, case = attention()
    eager, blocked = (peer(operator, case, name).bind(case) for name in ("eager", "blocked"))
    spec = case.spec
    assert isinstance(spec, shapes.AttentionSpec)
    scores = 4 * spec.B * spec.H * spec.N**2
    assert memory.kept_bytes(eager, case) > 2 * scores  # SiLU's input and output at least
    assert memory.kept_bytes(blocked, case) < scores / 10
    large = replace(spec, B=16, N=512)
    assert memory.peak_on_cpu("hstu_attention", large, "eager", 1) > 3 * 4 * 16 * spec.H * 512**2
    warmed = replace(spec, B=16, N=256)  # as large as its own warm-up
    assert warmed.small() == warmed
    assert memory.peak_on_cpu("hstu_attention", warmed, "eager", 1) > 3 * 4 * 16 * spec.H * 256**2


def test_turns_and_ratios() -> None:
    _, case = attention()
    x = torch.ones(4, requires_grad=True)
    calls = {"a": 0, "b": 0}

    def step(name: str) -> Step:
        def forward() -> torch.Tensor:
            calls[name] += 1
            return 2 * x

        return Step(forward, {"x": x})

    times = timing.take_turns({name: step(name) for name in calls}, torch.ones(4), seconds=0.0)
    assert calls == dict.fromkeys(calls, timing.WARM_UP + timing.LEAST_ROUNDS)
    assert len(times["a"].forward) == len(times["b"].backward) == timing.LEAST_ROUNDS
    slow, fast = (
        timing.Times([3.0, 30.0, 3.0], [1.0, 10.0, 1.0]),
        timing.Times([1.0, 10.0, 1.0], [1.0, 10.0, 1.0]),
    )
    assert timing.ratio(slow, fast, "forward") == 3 and timing.ratio(slow, fast, "both") == 2
    assert list(slow.of("both")) == [4, 40, 4]


def test_padding_is_undone() -> None:
    offsets = torch.tensor([0, 3, 3, 4, 9])
    rows = torch.randn(9, 2)
    index = padding.index(offsets, 5)
    padded = padding.pad(rows, index, 4, 5)
    assert padded.shape == (4, 5, 2) and torch.equal(padding.unpad(padded, index), rows)
    assert torch.equal(padded[3], rows[4:]) and not padded[1].any() and not padded[0, 3:].any()


@pytest.mark.parametrize("grid", shapes.GRIDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", operators.NAMES)
def test_shapes_have_names_of_their_own(operator: str, device: str, grid: str) -> None:
    specs = operators.load(operator).specs(device, grid)
    names = [spec.name for spec in specs]
    assert names and len(set(names)) == len(names)


def test_lengths_follow_their_distribution() -> None:
    def drawn(kind: str, N: int) -> np.ndarray:
        return shapes.AttentionSpec(kind, 4000, N, 1, 8, "none", "float32").draw()

    assert (drawn("full", 7) == 7).all()
    assert drawn("uniform", 100).min() == 1 and 49 < drawn("uniform", 100).mean() < 52
    ml_1m = drawn("ml-1m", 200)
    # a fifth of the users have more than 200 ratings; the median user has 96
    assert ml_1m.min() >= 18 and 0.2 < (ml_1m == 200).mean() < 0.3 and 85 < np.median(ml_1m) < 105


def test_options_that_name_nothing_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for more, word in (
        (["--against", "eagre"], "'eager'"),
        (["--ours", "cp"], "cpp"),
        (["--shapes", "n99*"], "ml-1m-n48"),
    ):
        assert run.main(command("hstu_attention", tmp_path, *more)) == 2
        assert word in capsys.readouterr().err
    with pytest.raises(UserError, match="no such operator"):
        run.load("telepathy")


def test_the_report_has_every_case_and_requirement(results: Path) -> None:
    steps = {"hstu_attention": {"command": "run", "status": "passed", "seconds": 1.0}}
    text = markdown.write(results, "cpu", steps).read_text()
    for operator in operators.NAMES:
        assert f"## {operator}" in text and f"({operator}.png)" in text
    for requirement in must_reach.REQUIREMENTS:
        assert requirement.text in text
    assert "| hstu_attention | passed | 1 | `run` |" in text
    assert "| reached |" not in text  # by a tiny case


def measured(
    lengths: str, bias: str, N: int, D: int, ways: dict[str, tuple[float, float]], **more: Any
) -> dict[str, Any]:
    """A case as a run's JSON has it: ways with milliseconds forward and backward, 1 TFLOP and 2.5."""
    both = {name: (f, b, f + b) for name, (f, b) in ways.items()}

    def figures(name: str, which: int) -> dict[str, Any]:
        ms = both[name][which]
        others = {other: times[which] / ms for other, times in both.items() if other != name}
        return {"ms_p50": ms, "tflops": (1, 2.5, 3.5)[which] / ms * 1e3, "speedup_over": others}

    return {
        "name": f"{lengths}-{N}",
        "lengths": lengths,
        "bias": bias,
        "N": N,
        "D": D,
        "H": 4,
        "dtype": "bfloat16",
        "ways": [{"way": w, **{p: figures(w, i) for i, p in enumerate(PASSES)}} for w in ways],
    }


def test_requirements_are_judged() -> None:
    ways = {"triton": (2.0, 6.0), "triton-deterministic": (2.0, 11.0), "sdpa-flash": (10.0, 20.0)}
    cases = [
        measured("full", "none", 4096, 64, ways),
        measured("full", "position", 4096, 64, {"triton": (2.2, 6.6)}),
        measured("full", "position+time", 4096, 64, {"triton": (3.4, 9.0), "sdpa-stored-bias": (5.0, 9.0)}),
        measured("ml-1m", "none", 200, 64, ways),
    ]
    runs = {"hstu_attention-a": {"operator": "hstu_attention", "cases": cases}}
    verdicts = {verdict.text: verdict for verdict in must_reach.judge(runs, "cuda")}

    def status(beginning: str) -> list[str]:
        return [v.status for text, v in verdicts.items() if text.startswith(beginning)]

    assert status("attention forward, D=64") == ["reached"]  # 500 TFLOP/s
    assert status("attention forward, D=128") == ["not measured"]
    assert status("deterministic two-pass backward, D=64") == ["missed"]  # 227
    assert status("position bias") == ["reached", "reached"]
    assert status("position+time bias") == ["missed", "reached"]  # 1.7 forward, 1.5 backward
    assert status("in-kernel bias faster") == ["reached"] and status("ML-1M") == ["reached"]
    assert {v.status for v in must_reach.judge(runs, "cpu") if v.on != must_reach.HOST} == {"not measured"}


def test_kernels_are_told_apart() -> None:
    sources = [*(suite.ROOT / "kernels" / "gr_kernels").glob("*/triton_*.py")]
    kernels = set(re.findall(r"^def (\w+)\(", "\n".join(file.read_text() for file in sources), re.MULTILINE))
    for part, names in (("attention", shares.ATTENTION), ("products", shares.PRODUCTS)):
        assert set(names) <= kernels and {shares.classify(name) for name in names} == {part}
    assert {shares.classify(name) for name in ("normalise", "gate", "gate_backward")} == {"elementwise"}
    assert (
        shares.classify("sm90_xmma_gemm_bf16bf16_bf16f32")
        == shares.classify("nvjet_tst_128x256")
        == "products"
    )
    assert shares.classify("vectorized_elementwise_kernel<4, silu>") == "elementwise"


def test_the_plan_of_the_gpu_report_names_shapes_and_peers_that_exist() -> None:
    steps = suite.plan("cuda", suite.RESULTS / "gpu", 1.0)
    assert not any(str(suite.ROOT) in word for step in steps for word in step.command)
    names = [step.name for step in steps]
    assert {"tests", "resources", *operators.NAMES} <= set(names) and len(names) == len(set(names))
    file, _, test = suite.EVERY_COMBINATION.partition("::")
    assert names[-1] == "tests-every-combination" and steps[-1].command[-1] == suite.EVERY_COMBINATION
    assert f"\ndef {test}(" in (suite.ROOT / file).read_text()
    assert "not slow" in steps[0].command and "-n" not in steps[0].command
    for step in steps:
        if suite.RUN[0] in step.command:
            options = run._parser().parse_args(step.command[step.command.index(suite.RUN[0]) + 1 :])
            operator = run.load(options.operator)
            run.select(operator.specs("cuda", options.grid), options.shapes)
            case = operator.build(operator.specs("cpu", "tiny")[0], CPU)
            assert run.choose(operator.ways(case), options.against, options.ours, torch.device("cuda"))
        elif suite.TRAINING[0] in step.command:
            options = scaling._parser().parse_args(step.command[step.command.index(suite.TRAINING[0]) + 1 :])
            assert options.device == "cuda" and scaling.cases(options.tables, options.engines, False, 2)
        elif "pytest" not in step.command:
            assert (suite.ROOT / step.command[1]).exists()


def test_every_operator_with_gpu_kernels_is_sanitized() -> None:
    """By tests that exist."""
    files = {
        f"test_{name}.py": (suite.ROOT / "tests" / "kernels" / f"test_{name}.py").read_text()
        for name in sanitizer.TESTS
    }
    for name, tests in sanitizer.TESTS.items():
        for test in tests:
            assert f"\ndef {test}(" in files[f"test_{name}.py"], test
    kernels = suite.ROOT / "kernels" / "gr_kernels"
    folders = {file.relative_to(kernels).parts[0] for file in kernels.rglob("triton_op.py")}
    assert folders == {name.removesuffix("_triton") for name in sanitizer.TESTS}
    assert set(sanitizer.RACECHECK) <= set(sanitizer.TESTS) and set(sanitizer.INITCHECK) <= set(
        operators.NAMES
    )
    commands = dict(sanitizer.steps("python", ("run.py",), "out"))
    for name in sanitizer.TESTS:
        assert commands[f"memcheck-{name}"][:3] == ("compute-sanitizer", "--tool", "memcheck")


def test_several_results_and_none_to_differentiate() -> None:
    x = torch.arange(6.0, requires_grad=True)
    step = Step(lambda: ((2 * x)[:4], (3 * x)[4:]), {"x": x})
    found = gradients(step, torch.arange(6.0))
    assert torch.equal(found["out"], torch.tensor([0.0, 2, 4, 6, 12, 15]))
    assert torch.equal(found["x"], torch.tensor([0.0, 2, 4, 6, 12, 15]))
    alone = timing.take_turns({"alone": Step(lambda: x.detach() + 1, {})}, torch.ones(6), 0.0, 3)["alone"]
    assert list(alone.of("backward")) == [0, 0, 0] and list(alone.of("both")) == list(alone.of("forward"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it asks for")
def test_the_gpu_report_without_a_gpu_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in error and error.count("\n") == 1


def test_steps_are_chosen_or_left_out() -> None:
    steps = [suite.Step(name, ()) for name in ("a", "b", "c")]

    def names(*asked: str) -> list[str]:
        return [step.name for step in suite.chosen(steps, asked)]

    assert names() == ["a", "b", "c"] and names("c", "a") == ["a", "c"]
    assert names("!b") == ["a", "c"] and names("!a", "!c") == ["b"] and names("a", "b", "!b") == ["a"]
    for unknown in ("d", "!d"):
        with pytest.raises(UserError, match="no such step"):
            names(unknown)


@pytest.mark.parametrize("installed", [False, True])
def test_every_combination_runs_in_parallel_where_it_can(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: object() if installed else None)
    command = suite.plan("cuda", suite.RESULTS / "gpu", 1.0)[-1].command
    assert (f"-n {os.cpu_count()}" in " ".join(command)) == installed


def test_steps_are_carried_out_and_what_is_missing_is_said(tmp_path: Path) -> None:
    missing = suite.carry_out(suite.Step("tool", ("no-such-program",)), tmp_path)
    assert missing["status"] == "not run: there is no no-such-program on this machine"
    failed = suite.carry_out(
        suite.Step("code", (suite.PYTHON, "-c", "print(7); raise SystemExit(3)")), tmp_path
    )
    assert failed["status"] == "failed (3): code.log" and (tmp_path / "code.log").read_text() == "7\n"


def test_the_cpu_report_is_made_step_by_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(device: str, folder: Path, seconds: float) -> list[suite.Step]:
        return [
            suite.Step(name, (suite.PYTHON, "-c", f"raise SystemExit({code})"))
            for name, code in codes.items()
        ]

    codes = {"good": 0, "bad": 1}
    monkeypatch.setattr(suite, "plan", plan)
    assert suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    codes["bad"] = 0
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--steps", "bad"]) == 0
    text = (tmp_path / markdown.REPORT).read_text()
    assert "| good | passed |" in text and "| bad | passed |" in text
    assert suite.main(["--device", "cpu", "--out", str(tmp_path), "--steps", "ugly"]) == 2
    assert "ugly" in capsys.readouterr().err
