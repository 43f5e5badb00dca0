"""``plan``: what a schedule saves, before any run."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from ltd_fx.cli.measure import Measured, measure
from ltd_fx.cli.schedule import add_schedule, scheduler_of
from ltd_fx.schedule import DEVICES, Model, Plan, make_plan


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True, help="size of the hidden states")
    parser.add_argument("--seq", type=int, required=True, help="tokens of a sequence")
    add_schedule(parser, "--schedule", required=True)
    parser.add_argument("--steps", type=int, required=True, help="of the whole run")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step, over all devices")
    parser.add_argument("--dense-layers", type=int, default=2, help="layers that are not routed (default: 2)")
    parser.add_argument("--vocabulary", type=int, default=0, help="size of the output projection, if there is one")
    parser.add_argument("--bidirectional", action="store_true", help="attention is not causal")
    parser.add_argument("--gpu", choices=sorted(DEVICES))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="time layers of this size on this machine")
    parser.add_argument("--device", default="cpu", help="what --measure runs on (default: cpu)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of the GPU's peak, dense (default: 0.4)")


def _plan(options: argparse.Namespace) -> int:
    model = Model(
        options.layers,
        options.hidden,
        options.seq,
        options.vocabulary,
        causal=not options.bidirectional,
        dense_layers=options.dense_layers,
    )
    plan = make_plan(
        model,
        scheduler_of(options),
        options.steps,
        batch=options.batch,
        device=DEVICES[options.gpu] if options.gpu else None,
        devices=options.gpus,
        utilisation=options.utilisation,
    )
    measured = None
    if options.measure:
        each = -(-options.batch // options.gpus)
        measured = measure(model, scheduler_of(options), options.steps, batch=each, device=options.device)
        if measured.time_saved < 0.8 * plan.flops_saved:
            plan = replace(plan, warnings=(*plan.warnings, _NO_USE))
    print(json.dumps(asdict(plan) | _json(measured)) if options.json else _table(plan, measured))
    return 0


_NO_USE = (
    "on this machine routing saves less than four fifths of the time that the operations saved would take: layers of "
    "this size wait for their kernels to start; larger batches or layers, or torch.compile, save more"
)


def _json(measured: Measured | None) -> dict[str, Any]:
    return {} if measured is None else {"measured": asdict(measured)}


def _table(plan: Plan, measured: Measured | None) -> str:
    rows = [
        ("layer tokens saved", f"{plan.layer_tokens_saved:.1%}"),
        ("operations, dense", f"{plan.dense_flops:.3g}"),
        ("operations saved", f"{plan.flops_saved:.1%}"),
        ("time saved", f"{plan.time_saved:.1%}"),
        ("activation memory saved at first", f"{plan.activations_saved:.1%}"),
        *((f"CUDA graphs, multiple_of {multiple}", f"{count:,}") for multiple, count in plan.lengths.items()),
    ]
    if plan.dense_seconds is not None and plan.routing_seconds is not None:
        rows += [
            ("hours, dense", f"{plan.dense_seconds / 3600:,.1f}"),
            ("hours, routed", f"{plan.dense_seconds * (1 - plan.time_saved) / 3600:,.1f}"),
            ("hours of routing itself", f"{plan.routing_seconds / 3600:,.2f}"),
        ]
    if measured is not None:
        rows += [
            (f"ms a layer, {keep} tokens, {measured.device}", f"{ms:.2f}") for keep, ms in measured.milliseconds.items()
        ]
        rows.append(("time of layers saved, measured", f"{measured.time_saved:.1%}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value:>10}" for name, value in rows]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])
