"""``python -m ltd_fx``."""

import sys

from ltd_fx.cli import main

sys.exit(main())
