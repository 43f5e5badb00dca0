"""From the training step to the reserved length, the layer tokens and the learning rate, and what they will save.

It knows of no model: whoever follows a scheduler implements :class:`ltd_fx.schedule.driven.Driven`.
"""

from ltd_fx.schedule.configuration import refuse_position
from ltd_fx.schedule.length import ReservedLength
from ltd_fx.schedule.lr import LayerTokenLR
from ltd_fx.schedule.planner import DEVICES, Model, Plan, make_plan
from ltd_fx.schedule.scheduler import LTDScheduler
