"""Where a training run stands, as files: enough to go on inside an epoch, with another number of
workers if need be.

    state.json          epoch, step, what the epoch has summed up so far, the epochs before it
    model.safetensors   weights
    average.safetensors averaged weights, where they are averaged over steps
    optimizer.pt        optimizer state; read with torch's ``weights_only``, so it runs no code
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.pt"
AVERAGE = "average.safetensors"


@dataclass(slots=True)
class State:
    """``step`` steps of epoch ``epoch`` (both 0-based) are done; ``loss_sum`` over ``rows`` is this
    epoch's so far. ``epochs`` has what was measured after each epoch, ``qualities`` by what epochs
    are compared, ``best`` the best of them with its full report."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rows: int = 0
    seconds: float = 0.0  # of training, over all sittings
    epochs: list[dict[str, Any]] = field(default_factory=list)
    qualities: list[list[float]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def bests(self) -> list[int]:
        """The epochs (1-based) that were better than all before them, in order."""
        found: list[int] = []
        for epoch, quality in enumerate(self.qualities, 1):
            if not found or quality > self.qualities[found[-1] - 1]:
                found.append(epoch)
        return found


def save(
    folder: str | Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> None:
    """Write the files into ``folder``."""
    base = Path(folder)
    (base / MODEL).write_bytes(pack_weights(model))
    if average is not None:
        (base / AVERAGE).write_bytes(pack_weights(average))
    torch.save(optimizer.state_dict(), base / OPTIMIZER)
    (base / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    average: nn.Module | None = None,
) -> State:
    """Put weights, optimizer and average back, in place; where the run stood."""
    base = Path(folder)
    model.load_state_dict(safetensors.torch.load((base / MODEL).read_bytes()))
    if average is not None:
        average.load_state_dict(safetensors.torch.load((base / AVERAGE).read_bytes()))
    optimizer.load_state_dict(torch.load(base / OPTIMIZER, map_location=device, weights_only=True))
    return State(**json.loads((base / STATE).read_text(encoding="utf-8")))


def pack_weights(model: nn.Module) -> bytes:
    """All of a model's tensors as safetensors."""
    # Cloned: safetensors refuses tensors that share memory; contiguous: kernels lie channels-last.
    tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
