"""What runs import sooner or later, for the server that forks the processes of tests: all of gr, and packages that it
imports when it needs them, where they are installed.  (Not Ray, which reads the environment as it is imported.)"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported

import gr

PACKAGES = [
    "torch.distributed.checkpoint",
    "torchrec.distributed",
    "fbgemm_gpu.quantize_comm",
    "deepspeed.ops",
    "deepspeed.runtime.zero.muon.original_muon",  # which DeepSpeed imports, and with it the compiler, when it starts
    "pandas",  # which pyarrow asks whether an array is one of its
    "matplotlib.pyplot",
    *(f"transformers.models.{model}.modeling_{model}" for model in ("bert", "vit", "resnet")),
    "tests.end_to_end.tiny",
]

for _name in [*(module.name for module in pkgutil.walk_packages(gr.__path__, "gr.")), *PACKAGES]:
    if not _name.endswith("__main__"):
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)
# What is there is looked through no more by those that are forked: DeepSpeed collects garbage each time it starts.
gc.collect()
gc.freeze()
