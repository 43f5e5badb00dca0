"""The graphs that Dynamo captures of a model, routed as they are compiled: the model itself stays as it is."""

from ltd_fx.dynamo.compile import Backend, backend
