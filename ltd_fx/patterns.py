"""The module that 0.1 had here is ``ltd_fx.learn.patterns`` now; its old name gives the same module."""

import sys

from ltd_fx.learn import patterns

sys.modules[__name__] = patterns
