"""Preparing on a Ray cluster: the same passes, with the parts of the log, the partitions and the files as tasks.

    read      a part of the log  -> its actions by partition, its distinct ids
    codes     a part's ids       -> the codes that these have among all
    sorting, counting, writing   a partition -> what gr/data/making/passes.py makes of it
    files     256 blocks         -> a Parquet file of the dataset: blocks cross partitions by sums of their users

Only small results and the tables of distinct items go through Ray, all else through the scratch folder, which is
identified by the log's files and the options; what another preparation left there is removed.

Nothing depends on which task is done first: results are taken in the order of the log and of the partitions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

import gr
from gr.data.blocks import Written
from gr.data.cluster import joined
from gr.data.columns import ColumnInfo, checksum
from gr.data.folder import Folder
from gr.data.hashing import derive
from gr.data.making.executor import Actions, name_of, workplace
from gr.data.making.ids import IdCodes, union
from gr.data.making.partitions import choose_bits, row_bytes
from gr.data.making.passes import Counting, Found, Sorting, Writing
from gr.data.making.quarantine import Quarantine
from gr.data.making.ray_steps import CodePart, OnPartition, Partitions, ReadPart, WriteFile, part_ids
from gr.data.making.ray_tasks import PLAN, Scratch, Tasks, Unfinished, task_folder
from gr.data.making.schema import Preparation
from gr.data.manifest import BLOCKS_PER_FILE
from gr.data.writing import BLOCK_ROWS, DatasetWriter
from gr.errors import UserError
from gr.progress import Progress, Stage

FORMAT = 1
"""Of the scratch folder."""
WORKER_BYTES = 192 << 20
"""Of a worker that does nothing: Python, Ray and Arrow."""
ITEM_BYTES = 64
"""Of a distinct item, in a worker: its flags, numbers and counts."""
FREE_OF_CONTENT = {"scratch", "memory_mb", "chunk_rows", "partitions"}
"""Options that change nothing in what the tasks leave; the number of partitions is kept by itself."""
DROPPED = "dropped"
"""Name of the file that says that a stage's large files are gone, since no later stage needs them."""


class OnRay:
    """The scratch folder stays when the work is cut short, and is removed when it is done or of no use."""

    def __init__(
        self,
        actions: Actions,
        out: str,
        options: Preparation,
        progress: Progress,
        address: str | None,
        tasks: int | None,
    ):
        self.actions, self.out, self.options, self.progress = actions, out, options, progress
        self.address, self.most = address, tasks
        self.row_bytes = row_bytes(actions.table_schema)
        self.bits = choose_bits(actions.estimated_rows, self.row_bytes, options.memory_mb, options.partitions)
        local, name = Folder(out).local, f".{name_of(out)}.preparing"
        if local is None and address is not None and not options.scratch:
            raise UserError(
                f"all hosts of the cluster work in one folder on the way to '{out}': set scratch to one that all see"
            )
        if options.scratch or local is None:  # others may put theirs there, for datasets of the same name
            name = f"{name}-{derive(out if local is None else local.absolute()):016x}"
        self.folder = workplace(out, options).absolute() / name
        self.dataset = self.folder / "dataset" if local is None else local.with_name(f".{local.name}.writing")
        self.quarantine = Quarantine(None)
        self.store: Partitions
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> OnRay:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locked())
            ray = stack.enter_context(joined(self.address))
            key = self._plan()
            scratch = Scratch(str(self.folder), self.out, key, gr.__version__)
            self.tasks = Tasks(ray, scratch, self.most)
            stack.callback(self.tasks.stop)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = kind is not None and (issubclass(kind, Unfinished) or not issubclass(kind, UserError))
        with self._exit:
            self.tasks.stop()
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The scratch folder is one process's at a time; the lock ends with the process, however that ends."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"'{self.out}' is being prepared by another process (it holds '{self.folder}/lock'): wait for it, "
                    "or end it"
                ) from None
            try:
                yield
            finally:
                if not (self.folder / PLAN).exists():
                    shutil.rmtree(self.folder, ignore_errors=True)

    def _plan(self) -> str:
        """Take up what an earlier process left, or begin anew; the key that the folder's content goes by."""
        identity = self.actions.identity()
        said = json.dumps(
            [
                FORMAT,
                gr.__version__,
                identity,
                self.options.model_dump(mode="json", exclude=FREE_OF_CONTENT),
                self.bits,
            ]
        )
        key = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        plan = self.folder / PLAN
        try:
            before = json.loads(plan.read_text())["key"]
        except FileNotFoundError:
            before = None
        except (ValueError, KeyError):
            before = ""
        if before == key and identity is not None:
            read = len(list((self.folder / "read").glob("[0-9]*")))
            self.progress.note(
                f"going on with what was begun in '{self.folder}': {read:,} parts of the log are read"
            )
            return key
        if before is not None:
            why = "is of another log or of other options"
            if identity is None:
                why = "was left by a preparation that was cut short, and nothing tells whether the log is the same"
            self.progress.note(f"'{self.folder}' {why}: begun anew")
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        aside = plan.with_suffix(".writing")
        aside.write_text(json.dumps({"key": key}))
        os.replace(aside, plan)
        return key

    def out_of_memory(self) -> UserError:
        return UserError(
            f"out of memory for '{self.out}' in the process that leads the work: it holds the distinct items and what "
            "is known of them; give it more memory"
        )

    # -- the stages ------------------------------------------------------------------------------------------------

    def read(self, stage: Stage) -> tuple[IdCodes, IdCodes]:
        options = self.options
        aside = self.folder / "quarantine"
        shutil.rmtree(aside, ignore_errors=True)
        self.quarantine = Quarantine(aside if options.on_bad_rows == "quarantine" else None)
        step = ReadPart(self.out, self.actions, options, self.bits)
        memory = WORKER_BYTES + options.chunk_rows * self.row_bytes
        rows = []
        for number, (plain, arrays) in self.tasks.run("read", step, enumerate(self.actions.parts()), memory):
            self.actions.add_seen(plain["seen"])
            part = task_folder(self.folder / "read", number)
            self.quarantine.absorb(part / "quarantine", plain["bad"]["rows"], plain["bad"]["reasons"])
            rows.append(arrays["rows_P"])
            stage.advance(int(arrays["rows_P"].sum()))
        self.quarantine.close()
        rows_JP = np.stack(rows) if rows else np.zeros((0, 1 << self.bits), dtype=np.int64)
        items, types = self._union("item", len(rows)), self._union("action_type", len(rows))
        self.store = Partitions(str(self.folder), rows_JP)
        if rows:
            codes = CodePart(str(self.folder), items, types)
            memory = WORKER_BYTES + len(items) * ITEM_BYTES
            deque(self.tasks.run("codes", codes, _numbers(len(rows)), memory), maxlen=0)
        return items, types

    def _union(self, name: str, parts: int) -> IdCodes:
        found = (part_ids(task_folder(self.folder / "read", n), name) for n in range(parts))
        return union((ids for ids in found if ids is not None), name.replace("_", " "))

    def go(self, name: str, step: Sorting | Counting, found: Found) -> Found:
        rows_P = np.zeros_like(self.store.rows)
        for partition, one, _ in self._pass(name, step):
            rows_P[partition] = one.items_C.sum()
            found.merge(one)
        if isinstance(step, Sorting):
            self.store = replace(self.store, replaced=self._stage(step), rows_P=rows_P)
            self._drop("read", "codes")
        return found

    def write(self, step: Writing, found: Found, writer: DatasetWriter) -> Found:
        users_P = np.zeros_like(self.store.rows)
        columns: list[dict[str, Any]] = []
        for partition, one, plain in self._pass("writing", step):
            users_P[partition] = one.users
            columns = plain["columns"] or columns
            found.merge(one)
        sequences = self._stage(step)
        self._drop("read", "codes", self.store.replaced)
        sums_P1 = np.concatenate([[0], np.cumsum(users_P)])
        file = WriteFile(str(self.folder), sequences, sums_P1, [ColumnInfo(**c) for c in columns])
        files = -(-int(sums_P1[-1]) // (BLOCKS_PER_FILE * BLOCK_ROWS))
        stage = f"files-{_digest(file)}"
        with self.progress.stage("files", int(sums_P1[-1]), "users") as progress:
            for number, (plain, _) in self.tasks.run(stage, file, _numbers(files), self._memory()):
                written = Written.from_json(plain)
                writer.adopt(task_folder(self.folder / stage, number), written)
                progress.advance(written.users)
        return found

    def _pass(
        self, name: str, step: Sorting | Counting | Writing
    ) -> Iterator[tuple[int, Found, dict[str, Any]]]:
        """What was found in each partition that has actions, with the partition's number and all of the result."""
        rows_P, stage = self.store.rows, self._stage(step)
        wanted = np.flatnonzero(rows_P).tolist()
        source = self.folder / (self.store.replaced or "read")
        if (source / DROPPED).exists() and set(wanted) - self.tasks.done(stage):
            raise UserError(
                f"the catalogue was changed after '{self.folder}' was begun: give the same command again, and it "
                "begins anew"
            )
        task = OnPartition(self.out, step, self.store, self.row_bytes)
        memory = self._memory() + step.items * ITEM_BYTES
        with self.progress.stage(name, int(rows_P.sum())) as progress:
            for number, (plain, arrays) in self.tasks.run(stage, task, ((n, None) for n in wanted), memory):
                yield number, Found.unpacked(plain, arrays), plain
                progress.advance(int(rows_P[number]))

    def _stage(self, step: Sorting | Counting | Writing) -> str:
        """The folder of a pass: what the pass depends on, beside the log and the options, is in its name."""
        return f"{type(step).__name__.lower()}-{_digest(step)}"

    def _memory(self) -> int:
        return WORKER_BYTES + (self.options.memory_mb << 20)

    def _drop(self, *stages: str | None) -> None:
        """Remove what later stages don't read; what is small stays, and says that the tasks are done."""
        for stage in filter(None, stages):
            folder = self.folder / stage
            (folder / DROPPED).touch()
            for pattern in ("*/actions.arrow", "*/*.npy"):
                for file in folder.glob(pattern):
                    file.unlink(missing_ok=True)


def _numbers(count: int) -> Iterator[tuple[int, None]]:
    return ((number, None) for number in range(count))


def _digest(value: Any) -> str:
    """Of a step's fields."""
    digest = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        elif isinstance(value, dict):
            for key, part in value.items():
                digest.update(f"{key}:".encode())
                add(part)
        elif isinstance(value, pa.Array):
            digest.update(f"{value.type}{len(value)}{checksum(value)}".encode())
        elif is_dataclass(value):
            for entry in fields(value):
                add(getattr(value, entry.name))
        elif isinstance(value, Preparation):
            add(value.model_dump_json(exclude=FREE_OF_CONTENT))
        elif isinstance(value, list):
            for one in value:
                add(one)
        else:
            digest.update(f"|{value!r}".encode())

    add(value)
    return digest.hexdigest()
