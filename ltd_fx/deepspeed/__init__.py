"""Moving from DeepSpeed's random-LTD: its configuration, its scheduler's checkpoints, its wrapper and helpers.

Its ``fixed_linear`` schedule is :class:`ltd_fx.LTDScheduler` with ``kind="linear"``. Nothing here imports DeepSpeed.
"""

from ltd_fx.deepspeed.config import from_config, load_scheduler_state
from ltd_fx.deepspeed.wrapper import (
    RandomLayerTokenDrop,
    convert_to_random_ltd,
    remove_random_ltd_state_dict,
    save_without_random_ltd,
)

__all__ = [
    "RandomLayerTokenDrop",
    "convert_to_random_ltd",
    "from_config",
    "load_scheduler_state",
    "remove_random_ltd_state_dict",
    "save_without_random_ltd",
]
