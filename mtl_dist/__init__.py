"""Multi-task training of one encoder, on one GPU or on a cluster; gradient surgery for any model and loop.

The public names load their modules when they are first used, so that `import mtl_dist` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_dist.config import UserError, load
    from mtl_dist.data.corpus import write_corpus
    from mtl_dist.data.mixer import Order
    from mtl_dist.data.packed import pack
    from mtl_dist.experiment import Experiment
    from mtl_dist.model.encoder import Encoder
    from mtl_dist.model.multitask import MultiTaskModel, load_model
    from mtl_dist.model.weights import build_encoder
    from mtl_dist.optim import AdamW
    from mtl_dist.surgery.conflict import Conflict
    from mtl_dist.surgery.surgery import Surgery
    from mtl_dist.surgery.zero import split_groups
    from mtl_dist.tasks import TaskConfig
    from mtl_dist.training.loop import train

__version__ = "0.1.0"

_HOMES = {
    "AdamW": "mtl_dist.optim",
    "Conflict": "mtl_dist.surgery.conflict",
    "Encoder": "mtl_dist.model.encoder",
    "Experiment": "mtl_dist.experiment",
    "MultiTaskModel": "mtl_dist.model.multitask",
    "Order": "mtl_dist.data.mixer",
    "Surgery": "mtl_dist.surgery.surgery",
    "TaskConfig": "mtl_dist.tasks",
    "UserError": "mtl_dist.config",
    "build_encoder": "mtl_dist.model.weights",
    "load": "mtl_dist.config",
    "load_model": "mtl_dist.model.multitask",
    "pack": "mtl_dist.data.packed",
    "split_groups": "mtl_dist.surgery.zero",
    "train": "mtl_dist.training.loop",
    "write_corpus": "mtl_dist.data.corpus",
}
__all__ = [
    "AdamW",
    "Conflict",
    "Encoder",
    "Experiment",
    "MultiTaskModel",
    "Order",
    "Surgery",
    "TaskConfig",
    "UserError",
    "build_encoder",
    "load",
    "load_model",
    "pack",
    "split_groups",
    "train",
    "write_corpus",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtl_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
