"""The newest figures of a run as a page for Prometheus, by the main process: http://HOST:PORT/metrics.

Its text format is a line a figure, so this is written here: the client package keeps one registry for a whole process,
which outlives a run.  Only this machine is answered unless ``log.prometheus`` names another address.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gr.errors import UserError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOPBACK = "127.0.0.1"
HELP = {
    "gr_step": "optimiser steps so far",
    "gr_epoch": "epochs that are finished",
    "gr_loss": "loss of the last step that was logged",
    "gr_learning_rate": "the optimiser's, at that step",
    "gr_gradient_norm": "before clipping, at that step",
    "gr_step_seconds": "of that step",
    "gr_data_wait_seconds": "that training waited for the batch of that step",
    "gr_samples_per_second": "sequences, over the last ten seconds of training",
    "gr_tokens_per_second": "targets, over the last ten seconds of training",
    "gr_evaluation": "the last evaluation of a split, a metric each",
}
ROWS = {
    "train": {"step": "gr_step", "epoch": "gr_epoch", "loss": "gr_loss", "lr": "gr_learning_rate"}
    | {"grad_norm": "gr_gradient_norm"},
    "timing": {"step": "gr_step", "step_s": "gr_step_seconds", "wait_s": "gr_data_wait_seconds"}
    | {"samples_per_s": "gr_samples_per_second", "tokens_per_s": "gr_tokens_per_second"},
}
"""Which key of a row of metrics.jsonl or timing.jsonl is which figure."""
NO_METRICS = {"kind", "split", "name", "epoch", "step", "users"}


class Exposition:
    """A server that answers until :meth:`close`.  ``address``: PORT, or HOST:PORT."""

    def __init__(self, address: str | int) -> None:
        host, _, port = str(address).rpartition(":")
        self._figures: dict[str, float] = {}
        self._changing = threading.Lock()
        page = self.page

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                content = page().encode() if found else b"the figures are at /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Nobody reads who asked."""

        try:
            self._server = ThreadingHTTPServer((host.strip("[]") or LOOPBACK, int(port)), Handler)
        except OSError as error:
            raise UserError(
                f"log.prometheus is {address}, where nothing can be served ({error.strerror}): choose a free port"
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def take(self, kind: str, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, or of timing.jsonl (``timing``)."""
        with self._changing:
            if kind == "eval":
                for name, value in row.items():
                    if name not in NO_METRICS and isinstance(value, int | float):
                        self._figures[
                            f'gr_evaluation{{split="{_safe(row["split"])}",metric="{_safe(name)}"}}'
                        ] = value
            for key, figure in ROWS.get(kind, {}).items():
                if isinstance(row.get(key), int | float):
                    self._figures[figure] = row[key]

    def page(self) -> str:
        with self._changing:
            figures = sorted(self._figures.items())
        lines = []
        for name, text in HELP.items():
            of_name = [
                f"{figure} {float(value)!r}" for figure, value in figures if figure.partition("{")[0] == name
            ]
            if of_name:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", *of_name]
        return "\n".join([*lines, ""])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2)


def _safe(text: Any) -> str:
    """As a label's value."""
    return re.sub(r'(["\\])', r"\\\1", str(text)).replace("\n", r"\n")
