"""`tokenpo` in a process of `accelerate launch`, its weights sharded on a CPU: sharded_on_cpu.py FOLDER WORDS...

accelerate reads its FSDP settings everywhere and follows them on accelerators only. Here it follows them too, and
FOLDER/RANK.json says at the end of training what each process was told and what it holds.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import TrainerCallback, trainer

from tokenpo.cli import main

by_accelerate = AcceleratorState.__init__


def sharded_here_too(state, *args, fsdp_plugin=None, **kwargs):
    """What accelerate does next on a GPU."""
    by_accelerate(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        state.fsdp_plugin, state.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class Told(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        plugin, parameters = AcceleratorState().fsdp_plugin, list(model.parameters())
        found = {
            "fsdp_version": plugin.fsdp_version,
            "fsdp_auto_wrap_policy": plugin.auto_wrap_policy.func.__name__,
            "fsdp_reshard_after_forward": plugin.reshard_after_forward,
            "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_state_dict_type": plugin.state_dict_type.name,
            "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
            "fsdp_activation_checkpointing": plugin.activation_checkpointing,
            "wrapped": [type(part).__name__ for part in model.modules() if isinstance(part, FSDPModule)],
            "parameters": sum(parameter.numel() for parameter in parameters),
            "held": sum(parameter.to_local().numel() for parameter in parameters),
        }
        Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    AcceleratorState.__init__ = sharded_here_too
    trainer.DEFAULT_CALLBACKS.append(Told)
    sys.exit(main(sys.argv[2:]))
