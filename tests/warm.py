"""What ranks have imported before they are forked: most of it would be imported during a training, and take seconds.

Imported and nothing else: a fork of a process that has computed may hang. What is not installed is left out.
"""

import gc
from contextlib import suppress
from importlib import import_module

FOR_ALL = [
    "mtl_dist.training.loop",
    "numpy.ctypeslib",
    "pandas",
    "pyarrow.compute",
    "pyarrow.pandas_compat",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.onnx",
    "torch.utils.tensorboard",
]
FOR_ZERO = [
    "setuptools",
    "transformers.integrations.deepspeed",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
for name in FOR_ALL + FOR_ZERO:
    with suppress(ImportError):
        import_module(name)
gc.freeze()  # or each rank would look through all of it, and have it copied, at the end of every run
