"""Create the engine of a configuration."""

from __future__ import annotations

from torch import nn

from coconut.config import AdamWConfig, EngineConfig, EngineKind
from coconut.engine.base import Engine, Loss
from coconut.engine.world import World


def make_engine(module: nn.Module, loss: Loss, config: EngineConfig, optimizer: AdamWConfig, world: World) -> Engine:
    """A LocalEngine or ZeroEngine for the module. Raises ValueError if DeepSpeed is needed and not installed."""
    if config.kind is EngineKind.deepspeed:
        from coconut.engine.zero import ZeroEngine

        return ZeroEngine(module, loss, config, optimizer, world)
    from coconut.engine.local import LocalEngine

    return LocalEngine(module, loss, config, optimizer, world)
