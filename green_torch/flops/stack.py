"""Why an operation runs, read off the Python stack: as work, as a replay, for the optimizer, inside compiled code.

A checkpoint's replay runs under ``CheckpointFunction.backward`` (reentrant; DeepSpeed and Megatron name theirs alike) or under
the hook that unpacks what non-reentrant checkpointing left out; FSDP's and Lightning's wrappers end in the same two. The stack is
looked at only inside a backward or with gradients off: a forward that builds a graph is always work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint as checkpointing

if TYPE_CHECKING:
    from types import FrameType


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
_UNPACKING = frozenset({"unpack_hook", "recompute_fn"})
_COMPILED_CALLS = frozenset({"runtime_wrapper", "_runtime_wrapper", "call_func_at_runtime_with_args"})
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: 0)  # noqa: SLF001 - 0: always look


def in_backward() -> bool:
    """Whether autograd is at work: in a backward, replays included."""
    return bool(_graph_task() != -1)


def reason() -> Reason:
    """Why the running operation runs."""
    backward = in_backward()
    if torch.is_grad_enabled() and not backward:
        return _WORK
    compiled = called = False
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if _replays(frame, inner):
            return Reason(Role.REPLAY, compiled)
        if name == "wrapper" and file == _OPTIMIZER:
            return Reason(Role.WORK if called or backward else Role.OPTIMIZER, compiled)
        if name == "closure" or (name == "_call_impl" and file == _MODULE):
            called = True  # by an optimizer that is further out, maybe: then it is the model's work, not the optimizer's
        elif name in _COMPILED_CALLS or "torchinductor" in file:
            compiled = True
        inner, frame = frame, frame.f_back
    return Reason(Role.WORK, compiled)


def _replays(frame: FrameType, inner: FrameType | None) -> bool:
    """Whether this is checkpoint code at its replay; a reentrant one goes on to its own backward, which is work."""
    code = frame.f_code
    if code.co_name == "backward":
        return code.co_qualname == "CheckpointFunction.backward" and not (inner and inner.f_code.co_filename == _AUTOGRAD)
    return code.co_name in _UNPACKING and code.co_filename == _CHECKPOINT
