"""What a config describes, built: data, then the model, then what trains it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gr.config import RunConfig, warn_of_idle_keys
from gr.data.batches import Batches, Plan
from gr.data.catalogue import Catalogue
from gr.data.dataset import SequenceDataset
from gr.data.order import Order
from gr.data.periods import Chronological
from gr.data.split import Split
from gr.data.transforms.transform import Transform, filters, samplers
from gr.embeddings.table import rows_come_later
from gr.errors import UserError
from gr.models.context import check_shareable
from gr.models.model import Model
from gr.processes import Processes
from gr.train.engines.engine import Engine
from gr.train.evaluation import Evaluation, baseline_kind
from gr.train.preflight import check_towers
from gr.train.selection import check_selection, judged_by
from gr.train.starting import start


@dataclass(frozen=True)
class Data:
    """The data of a run, opened: enough to evaluate or to recommend."""

    dataset: SequenceDataset
    split: Split
    catalogue: Catalogue


@dataclass(frozen=True)
class Parts:
    """All of a training run but its folder."""

    data: Data
    model: Model
    engine: Engine
    batches: Batches
    evaluation: Evaluation


def build(
    config: RunConfig, processes: Processes, generation: str | None = None, *, begun: str | None = None
) -> Parts:
    """Everything that ``config`` describes, on this process's device; refuses what can't train or be evaluated.
    ``generation``: of the dataset, where it may not be the newest.  ``begun``: a checkpoint will be loaded, of this
    generation of the dataset; tables are empty until then, but where they have grown."""
    data = processes.together(lambda: _open_to_train(config, generation))
    if processes.is_main:
        warn_of_idle_keys(config)
    data.catalogue.count_once(processes)
    data = replace(data, split=data.split.on(data.dataset, processes))
    parts = processes.together(lambda: _build(config, data, processes, begun))
    if begun is None:  # else what a checkpoint notes is compared on each
        check_towers(parts.model, processes)
    return parts


def _open_to_train(config: RunConfig, generation: str | None) -> Data:
    check_selection(config)
    for name in config.eval.baselines:
        baseline_kind(name, judged_by(config))
    data = open_data(config, generation)
    data.split.check_dataset(data.dataset)
    _check_one_pass(config, data.split)
    return data


def _check_one_pass(config: RunConfig, split: Split) -> None:
    """Refuse what needs to know the whole log before training, where training goes through it once."""
    if not isinstance(split, Chronological):
        return
    once = "data.split chronological goes through the log once"
    if whole := next((t.config.name for t in made_transforms(config) if getattr(t, "whole", False)), None):
        raise UserError(
            f"{once}, and transform '{whole}' takes examples from anywhere in it: leave it out of data.transforms"
        )
    if config.train.context > 1:
        raise UserError(f"{once}, which has only been tried with whole sequences: use train.context=1")
    if config.train.early_stopping is not None:
        raise UserError(f"{once}, so nothing can be validated again: leave train.early_stopping out")
    task = getattr(config.model, "task", None)
    if task is not None and task.component().masks:
        raise UserError(
            f"{once}, and model.task {task.name} has targets anywhere in a sequence: use model.task=next_item"
        )
    objective = config.objective
    if objective is not None and objective.component().counts_items(objective):  # type: ignore[attr-defined]
        key = "sampling=uniform" if hasattr(objective, "sampling") else "logq=false"
        raise UserError(
            f"{once}, and objective {objective.name} would count items that are still to come: use objective.{key}"
        )


def _build(config: RunConfig, data: Data, processes: Processes, begun: str | None) -> Parts:
    check_targets(config, data)
    model = build_model(config, data, processes, loaded=begun == data.dataset.manifest.generation)
    start(model, config, processes, begun=begun is not None)
    _check_something_trains(model, config)
    check_shareable(model, config)
    if config.train.activation_checkpointing:
        _recompute(model, config)
    engine = config.train.engine.build(
        model,
        config.optimizer.build(),
        processes,
        clip_norm=config.train.clip_norm,
        bf16=config.train.precision == "bf16",
    )
    evaluation = Evaluation(
        data.dataset,
        data.split,
        config,
        data.catalogue,
        judged_by=model.judged_by,
        processes=processes.of_whole_sequences(),
        columns=model.needs,
    )
    return Parts(data, model, engine, build_batches(config, data, model.needs, processes), evaluation)


def _check_something_trains(model: Model, config: RunConfig) -> None:
    """Refuse a model that has nothing to train, or an engine that can't leave a part of it as it is."""
    rows = any(not table.dense for table in model.tables.values())
    if not rows and not any(True for _ in model.named_dense()):
        raise UserError(
            "nothing of the model trains: leave its adapters, or a head, to train", everywhere=True
        )
    engine: type[Engine] = config.train.engine.component()
    if not engine.freezes and not all(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"train.engine {config.train.engine.name} has only been tried with sequence encoders that train whole: use "
            "train.engine=ddp (or all_reduce)",
            everywhere=True,
        )


def _recompute(model: Model, config: RunConfig) -> None:
    stacks = model.stacks()
    if not stacks:
        encoder = getattr(config.model, "encoder", None)
        which = f"model {config.model.name}" if encoder is None else f"model.encoder {encoder.name}"
        raise UserError(
            f"train.activation_checkpointing forms an encoder's layers again, one by one, and {which} has no such "
            "layers: leave it out"
        )
    for stack in stacks:
        stack.recompute = True


def open_data(config: RunConfig, generation: str | None = None) -> Data:
    """The data of a run: of the ``generation`` that it stands at, if the dataset has grown from that."""
    dataset = SequenceDataset(config.data.path, generation)
    for transform in (transforms := made_transforms(config)):
        transform.check_dataset(dataset)
    dataset = dataset.filtered(filters(transforms))
    split = config.data.split.build()
    return Data(dataset, split, dataset.catalogue.under(split))


def made_transforms(config: RunConfig) -> list[Transform]:
    """The filters and samplers of ``data.transforms``, in its order."""
    return [transform.build() for transform in config.data.transforms]


def build_model(config: RunConfig, data: Data, processes: Processes, loaded: bool = False) -> Model:
    """``loaded``: what the run has learnt on this very dataset will be loaded.  What it froze (``train.start_from``)
    stays away from its checkpoints, tables too, and is filled as for a new run."""
    dataset = data.dataset
    if dataset.items < 1:
        raise UserError("the dataset's catalogue is empty: prepare it again from a log with items")
    with rows_come_later(loaded and config.train.start_from is None):
        model = config.model.build(config, data.catalogue, processes)
    if "time" in model.needs and not dataset.has_timestamps:
        raise UserError(
            f"the encoder uses times and dataset '{config.data.path}' has none: "
            "set model.encoder.relative_time=false, or prepare the dataset with a time column"
        )
    dataset.require(model.needs, "the model")
    return model.place(processes.device)


def check_targets(config: RunConfig, data: Data) -> None:
    """Refuse a split that leaves nothing to train on, or nothing to evaluate."""
    counted, path = data.catalogue.counted, config.data.path
    if isinstance(data.split, Chronological):
        if data.split.periods is not None and not data.split.periods.count:
            raise UserError(
                f"no user of dataset '{path}' has an action from data.split.start on with another before it: choose an "
                "earlier start"
            )
        return
    if not data.split.training_rows(data.dataset.users):
        raise UserError(f"data.split leaves no training sequence of dataset '{path}': change it")
    if not counted.users:
        raise UserError(
            f"data.split leaves no user of dataset '{path}' two actions to train on, an input and its "
            f"target: hold out fewer{', keep more (data.transforms)' if data.dataset.filters else ''}, or prepare a "
            "log with longer histories"
        )
    for name in config.eval.splits:
        if not counted.targets[name]:
            raise UserError(
                f"no user of '{path}' has a held-out action in split '{name}': "
                "take it out of eval.splits, or change data.split"
            )


def build_batches(config: RunConfig, data: Data, needs: frozenset[str], processes: Processes) -> Batches:
    """This process's training batches; refuses a split that leaves none."""
    dataset, split = data.dataset, data.split
    order = Order(
        fingerprint=dataset.manifest.fingerprint,
        seed=config.train.seed,
        rows=split.training_rows(dataset.users),
        block_rows=dataset.manifest.block_rows,
        window_blocks=config.data.window_blocks,
        shuffle=config.data.order == "shuffle",
    )
    plan = Plan(
        split,
        order,
        config.train.global_batch,
        config.data.max_length,
        config.data.tail,
        needs,
        samplers(made_transforms(config)),
        dataset.filters,
    )
    batches = config.data.ingest.build(
        dataset,
        plan,
        rank=processes.data.rank,
        ranks=processes.data.size,
        prefetch=config.data.prefetch,
        pin_memory=processes.device.type == "cuda",
    )
    if batches.epochs is None and not batches.in_epoch(0):
        raise UserError(
            f"dataset '{config.data.path}' has {order.rows} training sequences, fewer than train.global_batch "
            f"{config.train.global_batch} with data.tail=drop: lower the batch or keep the tail"
        )
    return batches
