"""The operators as CUDA kernels: their source, its compilation at first use, and their launch.

Importing it registers them; it neither loads them nor touches CUDA.
"""

from ltd_fx.cuda import ops
from ltd_fx.cuda.driver import kernels_on
