"""From a model to patterns: which of its layers are targets, how they are called, which arguments follow the tokens.

What it learns is a hypothesis until ``prove`` has tried it.
"""

from ltd_fx.learn.alike import likeness, shapes, structure
from ltd_fx.learn.call_site import CallSite, Proof
from ltd_fx.learn.find import Layers, find_layers, find_stacks, flat_layers, layer_in
from ltd_fx.learn.hooks import leaves_hooks_out, may_change
from ltd_fx.learn.hypotheses import Learner
from ltd_fx.learn.layer_pattern import LayerPattern, forward_signature
from ltd_fx.learn.observe import Call, describe, is_stream, observe, observe_values, quiet, run_forward, split_inputs
from ltd_fx.learn.patterns import align_attention_mask, find_pattern_maybe, register_pattern
from ltd_fx.learn.probe import by_name, narrowed, stream
from ltd_fx.learn.sandbox import Sandbox, tensors_in
from ltd_fx.learn.traced import calls_of, mark_module, traced_inputs
