"""What of a trained network trains on, as a config says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from gr.config import POSITIVE, Section

WITHOUT_SIZE = ("full", "frozen", "bitfit")


class AdapterSection(Section):
    """full: everything; frozen: nothing.  Of the others the network stays as it is, and these train inside it:

    houlsby: x + up(gelu(down(x))) after the attention's and after the feed-forward's output, before Add & Norm
    (Houlsby et al., 2019); parallel: the same two beside the sublayers, LN(ad(x) + f(x) + x); pfeiffer: one, after the
    feed-forward (Pfeiffer et al., 2021); compacter: as houlsby, of hypercomplex layers, 4 shared rules, rank 1 (Karimi
    Mahabadi et al., 2021); k_adapter: a network beside the blocks that reads what each gives, and whose sum is added to
    the last one's (after Wang et al., 2021); lora: low-rank updates of queries and values (Hu et al., 2022), alpha =
    rank; bitfit: all biases (Ben Zaken et al., 2022); prompt: so many learned tokens before a text, or behind the
    patches of a picture (Lester et al., 2021).
    size: of the bottleneck, the rank, or the number of tokens.  norms: LayerNorms train too.
    """

    shorthand = "name"
    name: Literal[
        "full",
        "frozen",
        "houlsby",
        "parallel",
        "pfeiffer",
        "compacter",
        "k_adapter",
        "lora",
        "bitfit",
        "prompt",
    ] = "houlsby"
    size: POSITIVE = 64
    norms: bool = False

    def idle(self) -> dict[str, str]:
        why = f"name is {self.name}"
        idle = {"size": why} if self.name in WITHOUT_SIZE else {}
        return idle | ({"norms": why} if self.name in ("full", "frozen") else {})


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


ADAPTERS = Annotated[AdapterSection, BeforeValidator(_named)]
