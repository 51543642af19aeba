"""The newest figures of a run, as Prometheus reads them."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

import pytest

from gr import config as configs
from gr.errors import UserError
from gr.train import job
from gr.train.exposition import Exposition
from tests.end_to_end.tiny import make_dataset, write_config


def read(port: int, path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_run_serves_its_figures_and_stops(tmp_path):
    make_dataset(tmp_path / "data")
    settings = ["train.max_steps=3", "log.prometheus=0", "eval.splits=[valid]", "eval.ks=[10]"]
    config = configs.load(write_config(tmp_path, tmp_path / "data", tmp_path / "run"), settings)
    ports, pages = [], []
    real = Exposition.__init__

    def made(self, address):
        real(self, address)
        ports.append(self.port)
        self.take("eval", {"kind": "eval", "split": 'a"b', "ndcg@10": 0.5, "users": 3})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exposition, "__init__", made)
        result = job.run(config, on_step=lambda folder: pages.append(read(ports[0])))
    kind, page = pages[-1]
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    # the format's grammar: comments of two kinds, and lines NAME{LABELS} VALUE
    line = r'(# (HELP|TYPE) gr_\w+ .+|gr_\w+(\{\w+="([^"\\]|\\.)*"(,\w+="([^"\\]|\\.)*")*\})? -?[\d.e+-]+)'
    assert all(re.fullmatch(line, one) for one in page.splitlines()) and page.endswith("\n")
    loss = next(row["loss"] for row in result.metrics if row["kind"] == "train" and row["step"] == 3)
    assert "gr_step 3.0\n" in page and f"gr_loss {loss!r}\n" in page and "gr_tokens_per_second " in page
    assert 'gr_evaluation{split="a\\"b",metric="ndcg@10"} 0.5\n' in page
    with pytest.raises(urllib.error.URLError):
        read(ports[0])


def test_where_to_serve():
    first = Exposition("127.0.0.1:0")
    try:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(first.port, "/")
        with pytest.raises(UserError, match=r"log\.prometheus is \d+, where nothing can be served"):
            Exposition(first.port)
    finally:
        first.close()


@pytest.mark.parametrize("value", ["x", "70000", "a:b:1", "[]"])
def test_an_address_that_is_none_is_refused(tmp_path, value):
    file = write_config(tmp_path, tmp_path / "data", tmp_path / "run")
    with pytest.raises(UserError, match=r"log\.prometheus"):
        configs.load(file, [f"log.prometheus={value}"])
