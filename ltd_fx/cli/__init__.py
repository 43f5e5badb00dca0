"""``python -m ltd_fx``: what can be asked from a shell."""

import argparse
import sys
from collections.abc import Sequence

from ltd_fx.cli import clean, env, inspect, plan, schedule
from ltd_fx.errors import LTDError

_COMMANDS = {
    "clean": (clean, "any checkpoint, with the untransformed model's keys"),
    "env": (env, "versions, kernels, and what is missing"),
    "inspect": (inspect, "which layers of a model are routed, and whether that is proven right"),
    "plan": (plan, "what a schedule saves, before any run"),
    "schedule": (schedule, "the lengths of a schedule"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1, where ``inspect`` finds a layer that is not proven right; 2, what cannot be done.
    """
    parser = argparse.ArgumentParser(prog="ltd-fx", description="Random layerwise token dropping.")
    commands = parser.add_subparsers(required=True)
    for name, (module, purpose) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="for scripts")
        module.add(command)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except LTDError as error:
        print(error, file=sys.stderr)
        return 2
    return code
