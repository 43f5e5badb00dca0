"""What a rewritten graph calls in a forward: draw tokens, gather what follows them, split and merge hidden states.

Also the state that the routed layers of a model share. It knows of no graph: ``passes`` puts the calls there.
"""

from ltd_fx.runtime.arguments import Aligned, gather_argument, gather_arguments, gather_extra, gather_extras
from ltd_fx.runtime.documents import BOUNDARIES
from ltd_fx.runtime.draw import draw_tokens, hidden_shape
from ltd_fx.runtime.hand_over import hand_over, rest_of, take_over
from ltd_fx.runtime.kernels import attentions, is_flash, kernel_of, window_of
from ltd_fx.runtime.packed import PACKED, hand_boundaries, restart_positions
from ltd_fx.runtime.preferences import SAMPLING, Batch, Preferences, Protect
from ltd_fx.runtime.ranks import gather_from_ranks
from ltd_fx.runtime.records import Draw, Site, Span, compiled_together
from ltd_fx.runtime.replay import sampled_indices
from ltd_fx.runtime.split_merge import merge_output, split_hidden
from ltd_fx.runtime.state import UNTESTED, RouteState
