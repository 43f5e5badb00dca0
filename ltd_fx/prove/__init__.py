"""Whether a routed layer is right: it must equal the dense layer with attention to the dropped tokens blocked.

Nothing is installed that failed here.
"""

from ltd_fx.prove.examine import Examination
from ltd_fx.prove.proof import prove
