"""Create the engine of a configuration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from coconut.config import AdamWConfig, EngineConfig, EngineKind
from coconut.engine.base import Engine, Loss
from coconut.engine.world import World


def make_engine(
    module: nn.Module, loss: Loss, config: EngineConfig, optimizer: AdamWConfig, world: World,
    lr_factors: Mapping[str, float] | None = None,
) -> Engine:  # fmt: skip
    """A LocalEngine or ZeroEngine for the module. `lr_factors`: see `adamw`; a ZeroEngine has one learning rate.

    Raises ValueError if DeepSpeed is needed and not installed.
    """
    if config.kind is EngineKind.deepspeed:
        assert not lr_factors, "a checkpoint of a ZeroEngine has one group of parameters"
        from coconut.engine.zero import ZeroEngine

        return ZeroEngine(module, loss, config, optimizer, world)
    from coconut.engine.local import LocalEngine

    return LocalEngine(module, loss, config, optimizer, world, lr_factors)
