"""Why an operation runs, read off the Python stack: as work, as a replay, for the optimizer, inside compiled code.

A checkpoint's replay runs under ``CheckpointFunction.backward`` (reentrant; DeepSpeed and Megatron name theirs alike) or under
the hook that unpacks what non-reentrant checkpointing left out; FSDP's and Lightning's wrappers end in the same two. The stack is
looked at only inside a backward or with gradients off: a forward that builds a graph is always work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum

import torch
import torch.utils.checkpoint as checkpointing


class Role(Enum):
    """What an operation runs for."""

    WORK = "work"
    REPLAY = "replay"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Reason:
    """An operation's role, and whether compiled code called it."""

    role: Role
    compiled: bool = False


_WORK = Reason(Role.WORK)
_CHECKPOINT = checkpointing.__file__
_AUTOGRAD = torch.autograd.__file__
_OPTIMIZER = torch.optim.Optimizer.profile_hook_step.__code__.co_filename
_MODULE = torch.nn.Module._call_impl.__code__.co_filename  # noqa: SLF001 - only to know the frame when it is seen
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: 0)  # noqa: SLF001 - 0: always look


def reason() -> Reason:
    """Why the running operation runs."""
    in_backward = _graph_task() != -1
    if torch.is_grad_enabled() and not in_backward:
        return _WORK
    compiled = False
    outer_call = False  # a module or closure between the operation and what is further out: not the optimizer's own work
    inner = None
    frame = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
    while frame is not None:
        code = frame.f_code
        name = code.co_name
        if name == "backward":
            if code.co_qualname == "CheckpointFunction.backward" and not (inner and inner.f_code.co_filename == _AUTOGRAD):
                return Reason(Role.REPLAY, compiled)
        elif name in {"unpack_hook", "recompute_fn"}:
            if code.co_filename == _CHECKPOINT:
                return Reason(Role.REPLAY, compiled)
        elif name == "wrapper":
            if code.co_filename == _OPTIMIZER:
                return Reason(Role.WORK if outer_call or in_backward else Role.OPTIMIZER, compiled)
        elif name in {"_call_impl", "closure"}:
            outer_call = outer_call or name == "closure" or code.co_filename == _MODULE
        elif "torchinductor" in code.co_filename or name in {"runtime_wrapper", "_runtime_wrapper"}:
            compiled = True
        inner, frame = frame, frame.f_back
    return Reason(Role.WORK, compiled)
