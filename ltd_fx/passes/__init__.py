"""Graph in, graph out: ``outline``, ``locate``, ``align``, ``route``, ``check``, ``span``.

A pass changes the graph in place and returns how many places it changed. ``rewrite`` runs all of them; ``capture``
makes the graphs that they start from, ``routed_layer`` a class out of a layer's graph.
"""

from ltd_fx.passes.align import align
from ltd_fx.passes.check import check
from ltd_fx.passes.graph_pass import GraphPass, inductor_pass
from ltd_fx.passes.kept import kept_arguments
from ltd_fx.passes.locate import Target, locate
from ltd_fx.passes.mark import mark
from ltd_fx.passes.outline import outline
from ltd_fx.passes.put import put_layers, put_module
from ltd_fx.passes.rewrite import check_calls, rewrite
from ltd_fx.passes.route import route
from ltd_fx.passes.routed_layer import (
    SCRIPTING,
    SITE,
    RoutedLayer,
    as_they_were,
    is_routed_forward,
    refuse_replicas,
    refuse_scripting,
    routed_class,
    swap_back,
    swap_class,
)
from ltd_fx.passes.span import span
