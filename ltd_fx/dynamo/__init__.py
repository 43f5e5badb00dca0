"""The graphs that Dynamo captures of a model, routed as they are compiled: the model itself stays as it is."""

from ltd_fx.dynamo.backend import Backend as Backend
from ltd_fx.dynamo.backend import Inner as Inner
