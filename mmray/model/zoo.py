"""The door to torchvision's networks."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


@functools.cache
def models() -> ModuleType:
    """``torchvision.models``, imported without torch's compiler.

    torchvision.ops means to leave that to its first use, but takes one function of it by name: two
    of the five seconds that a process imports before it can score.
    """
    if _COMPILER in sys.modules:
        return importlib.import_module("torchvision.models")
    stand_in = ModuleType(_COMPILER)
    stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules[_COMPILER] = stand_in
    try:
        return importlib.import_module("torchvision.models")
    finally:
        del sys.modules[_COMPILER]


def _is_compile_supported(*args: Any) -> Any:
    return importlib.import_module(_COMPILER).is_compile_supported(*args)
