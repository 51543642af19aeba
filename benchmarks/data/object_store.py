"""Reading a sequence dataset from S3, beside pyarrow's own client on the same row groups of the same server.

    python benchmarks/data/object_store.py --latency-ms 0 20

The server is a process of its own on this machine that answers HEAD and ranged GET from memory, after a wait of
``--latency-ms``; it is no object store, it only costs as little as can be.  The ways take turns, ``--rounds`` times.
pyarrow reads with its files opened and footers known, its best; what gr does beyond that (checksums) is left out in one
row and counted in the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from gr.data.dataset import SequenceDataset
from gr.data.sequences import Sequences
from gr.data.stores import AHEAD, in_order
from gr.data.writing import DatasetWriter

RESULTS = Path(__file__).parents[1] / "results" / "data_object_store.json"
COLUMNS = ("item", "time")


def generate(folder: Path, users: int, mean_length: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.poisson(mean_length, users).clip(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    writer = DatasetWriter(folder, "set", row_order="stream")
    for start in range(0, users, 1024):
        stop = min(start + 1024, users)
        a, b = int(offsets[start]), int(offsets[stop])
        columns = {"time": np.sort(rng.integers(1.4e9, 1.7e9, b - a)), "price": rng.random(b - a)}
        rows = Sequences.of(
            np.arange(start, stop),
            offsets[start : stop + 1] - a,
            item=rng.integers(0, 1 << 20, b - a).astype(np.int32),
            **columns,
        )
        writer.add(rows)
    writer.finish(pa.table({"item_id": np.arange(1 << 20), "count": np.full(1 << 20, total // (1 << 20))}))


def serve(folder: str, latency_s: float, ready) -> None:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def answer(self) -> None:
            time.sleep(latency_s)
            path, _, query = self.path.lstrip("/").partition("?")
            name = path.removeprefix("data/set/")
            if "list-type" in query:
                entries = "".join(
                    f"<Contents><Key>set/{n}</Key><Size>{len(c)}</Size><ETag>x</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    for n, c in files.items()
                    if n.startswith("sequences/")
                )
                body = (
                    f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
                )
                self.reply(200, body, len(body))
                return
            content = files.get(name)
            if content is None:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>", 0)
                return
            span = self.headers.get("Range")
            if span:
                first, last = span.removeprefix("bytes=").split("-")
                body = memoryview(content)[int(first) : int(last) + 1]
                self.reply(206, body, len(body), f"bytes {first}-{last}/{len(content)}")
            else:
                self.reply(200, content, len(content))

        do_GET = do_HEAD = answer

        def reply(self, status: int, body, size: int, span: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("ETag", '"x"')
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def ways(local: SequenceDataset, port: int) -> dict[str, Callable[[], int]]:
    """Name -> reads all row groups' ``COLUMNS``, returns their bytes in memory."""
    import pyarrow.fs

    client = pyarrow.fs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{port}", region="us-east-1")
    blocks = local.manifest.blocks
    footers = {b.file: pq.read_metadata(local.path / b.file) for b in blocks}
    stored = [local.column(name).stored for name in COLUMNS]
    opened = {file: client.open_input_file(f"data/set/{file}") for file in footers}
    there = SequenceDataset("s3://data/set")

    def arrow(number: int) -> int:
        block = blocks[number]
        parquet = pq.ParquetFile(opened[block.file], metadata=footers[block.file], pre_buffer=True)
        return parquet.read_row_group(block.row_group, columns=stored).nbytes

    def ours(number: int) -> int:
        block = blocks[number]
        with there.folder.parquet(
            block.file, there._footer(block.file), [block.row_group], stored
        ) as parquet:
            return parquet.read_row_group(block.row_group, columns=stored).nbytes

    def checked(number: int) -> int:
        there._checked.clear()
        there.read_block(number, COLUMNS)
        return ours_bytes[number]

    numbers = range(len(blocks))
    ours_bytes = [ours(number) for number in numbers]

    def together(read: Callable[[int], int]) -> int:
        with ThreadPoolExecutor(AHEAD) as pool:
            return sum(pool.map(read, numbers))

    return {
        "pyarrow, one at a time": lambda: sum(map(arrow, numbers)),
        "gr, one at a time": lambda: sum(map(ours, numbers)),
        f"pyarrow, {AHEAD} threads": lambda: together(arrow),
        f"gr, {AHEAD} ahead": lambda: sum(in_order(ours, numbers, AHEAD)),
        f"gr, {AHEAD} ahead, checked and decoded": lambda: sum(in_order(checked, numbers, AHEAD)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=64 * 1024)
    parser.add_argument("--length", type=int, default=100, help="actions a user, on average")
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 20.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nobody",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "set", options.users, options.length)
        local = SequenceDataset(Path(folder) / "set")
        for latency in options.latency_ms:
            receiving, sending = get_context("spawn").Pipe(duplex=False)
            server = get_context("spawn").Process(
                target=serve, args=(str(local.path), latency / 1000, sending)
            )
            server.start()
            try:
                port = receiving.recv()
                os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
                import fsspec

                fsspec.get_filesystem_class("s3").clear_instance_cache()
                found = ways(local, port)
                seconds: dict[str, list[float]] = {name: [] for name in found}
                sizes = {name: read() for name, read in found.items()}  # once before it counts
                assert len(set(sizes.values())) == 1, sizes
                for _ in range(options.rounds):
                    for name, read in found.items():
                        start = time.perf_counter()
                        read()
                        seconds[name].append(time.perf_counter() - start)
            finally:
                server.terminate()
                server.join()
            for name, times in seconds.items():
                mib = sizes[name] / 2**20
                results.append(
                    {
                        "latency_ms": latency,
                        "way": name,
                        "row_groups": len(local.manifest.blocks),
                        "mib": round(mib, 1),
                        "mib_per_s": round(mib / statistics.median(times), 1),
                        "least": round(mib / max(times), 1),
                        "most": round(mib / min(times), 1),
                    }
                )
    table = Table("latency", "way", "MiB/s (median)", "least to most")
    for r in results:
        spread = f"{r['least']:,} - {r['most']:,}"
        table.add_row(f"{r['latency_ms']:g} ms", r["way"], f"{r['mib_per_s']:,}", spread)
    Console().print(table)
    about = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "columns": COLUMNS,
    }
    options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
