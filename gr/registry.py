"""Tables of names: what a config may ask for, and where it lives.

A name maps to ``module:attribute``; nothing is imported until it is used.  Adding a model, an objective or a
dataset is one file and one line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gr.errors import UserError, nearest

ENCODERS = {
    "hstu": "gr.models.hstu:HSTU",
    "sasrec": "gr.models.sasrec:SASRec",
    "transformer": "gr.models.transformer:Transformer",
    "gru4rec": "gr.models.gru4rec:GRU4Rec",
    "dssm": "gr.models.dssm:DSSM",
    "pooled": "gr.models.pooled:Pooled",
}

MODELS = {
    "retrieval": "gr.models.retrieval:Retrieval",
    "ranking": "gr.models.ranking:Ranking",
    "din": "gr.models.din:DIN",
    "dlrm": "gr.models.dlrm:DLRM",
    "two_tower": "gr.models.two_tower.model:TwoTower",
}

NETWORKS = {
    "lr": "gr.models.two_tower.joint:LR",
    "wide_deep": "gr.models.two_tower.joint:WideDeep",
    "deepfm": "gr.models.two_tower.joint:DeepFM",
    "dcn": "gr.models.two_tower.joint:DCN",
    "autoint": "gr.models.two_tower.joint:AutoInt",
    "cold": "gr.models.two_tower.joint:COLD",
    "dssm": "gr.models.two_tower.towers:DSSM",
    "dat": "gr.models.two_tower.towers:DAT",
    "inttower": "gr.models.two_tower.towers:IntTower",
}

TABLES = {
    "local": "gr.embeddings.local:LocalTable",
    "mapped": "gr.embeddings.mapped:MappedTable",
    "torchrec": "gr.embeddings.sharded:TorchRecTable",
}

TOWERS = {
    "id": "gr.modality.towers:Id",
    "text": "gr.modality.towers:Text",
    "image": "gr.modality.towers:Image",
    "fused": "gr.modality.towers:Fused",
}

VOCABULARIES = {
    "open": "gr.embeddings.vocabulary:OpenVocabulary",
}

ENGINES = {
    "ddp": "gr.train.engines.ddp:DDP",
    "all_reduce": "gr.train.engines.all_reduce:AllReduce",
    "fsdp": "gr.train.engines.fsdp:FSDP",
    "deepspeed": "gr.train.engines.deepspeed:DeepSpeed",
}

METRICS = {
    "catalogue": "gr.eval.catalogue:CatalogueMetrics",
    "pointwise": "gr.eval.pointwise:PointwiseMetrics",
}

SPLITS = {
    "leave_one_out": "gr.data.split:LeaveOneOut",
    "global_time": "gr.data.split:GlobalTime",
    "records": "gr.data.split:Records",
    "impressions": "gr.data.split:Impressions",
    "chronological": "gr.data.periods:Chronological",
}

TRANSFORMS = {
    "filter_actions": "gr.data.transforms.filter_actions:FilterActions",
    "stochastic_length": "gr.data.transforms.stochastic_length:StochasticLength",
    "session_ends": "gr.data.transforms.session_ends:SessionEnds",
}

INGEST = {
    "arrow": "gr.data.loader:Arrow",
    "direct": "gr.data.loader:Direct",
    "ray": "gr.data.remote:Ray",
}

TASKS = {
    "next_item": "gr.models.tasks:NextItem",
    "cloze": "gr.models.tasks:Cloze",
}

OBJECTIVES = {
    "sampled_softmax": "gr.models.objectives.sampled_softmax:SampledSoftmax",
    "full_softmax": "gr.models.objectives.full_softmax:FullSoftmax",
    "bce": "gr.models.objectives.pairwise:BCE",
    "bpr": "gr.models.objectives.pairwise:BPR",
    "in_batch": "gr.models.objectives.in_batch:InBatchDebiased",
}

BASELINES = {
    "popularity": "gr.eval.baselines:Popularity",
    "last_item": "gr.eval.baselines:LastItem",
    "item_knn": "gr.eval.baselines:ItemKNN",
    "prior": "gr.eval.baselines:Prior",
    "oracle": "gr.data.making.sources.synthetic_dp:Oracle",
}

OPTIMIZERS = {
    "adamw": "gr.train.optimizers:AdamW",
    "sgd": "gr.train.optimizers:SGD",
    "lazy_adam": "gr.train.optimizers:LazyAdam",
    "rowwise_adagrad": "gr.train.optimizers:RowwiseAdagrad",
}

DATASETS = {
    "ml-1m": "gr.data.making.sources.movielens:ML1M",
    "ml-1m-ctr": "gr.data.making.sources.movielens_ctr:ML1MCTR",
    "ml-20m": "gr.data.making.sources.movielens:ML20M",
    "amazon-books": "gr.data.making.sources.amazon:AmazonBooks",
    "amazon-beauty": "gr.data.making.sources.amazon:AmazonBeauty",
    "kuairand-pure": "gr.data.making.sources.kuairand:KuaiRandPure",
    "synthetic-dp": "gr.data.making.sources.synthetic_dp:SyntheticDP",
    "log": "gr.data.making.sources.log:ActionLog",
    "lists": "gr.data.making.sources.lists:UserLists",
    "sequences": "gr.data.making.sources.sequences:SequenceFiles",
    "recbole": "gr.data.making.sources.recbole:RecBole",
    "ray": "gr.data.making.sources.ray_data:RayData",
}


def check(table: dict[str, str], name: str, what: str) -> None:
    """Refuse a name that ``table`` does not have; ``what`` names the table in the error."""
    if name not in table:
        raise UserError(f"unknown {what} '{name}': {nearest(name, table)}")


def resolve(table: dict[str, str], name: str, what: str) -> Any:
    """The object that ``name`` stands for in ``table``; ``what`` names the table in the error."""
    check(table, name, what)
    module, attribute = table[name].split(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gr", ""):
            raise
        raise UserError(f"{what} '{name}' needs the package '{error.name}': install it") from error
