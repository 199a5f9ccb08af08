"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from megabyte_jax.planning.plan import Plan
from megabyte_jax.planning.topology import GIB


def text(plan: Plan) -> str:
    """The whole plan, every figure with its unit."""
    chips = "" if plan.chips is None else f"{_count(plan.chips, 'chip')}, "
    device = "chip" if plan.chips == plan.devices else "device"
    memory = plan.memory_bytes
    rows = {name: size for name, size in memory.items() if name != "available"}
    if plan.host_bytes:
        rows["beside it, in the hosts' memory"] = plan.host_bytes
    lines = [
        f"{plan.topology} = {plan.product}: {chips}{_count(plan.devices, 'device')}",
        "mesh "
        + " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
        + f"; {plan.num_parameters:,} parameters; an update is {plan.batch_size} x "
        f"{plan.seq_len:,} bytes in {_count(plan.grad_accumulation, 'part')}",
        f"IT FITS: {_gib(memory['total'])} of {_gib(memory['available'])} GiB per {device}",
        "",
        f"Memory per {device}",
        *_rows([[name, _gib(size), "GiB"] for name, size in rows.items()]),
    ]
    held = sum(memory[name] for name in ("parameters", "optimizer's state", "batch"))
    lines += [
        f"  the compiler's own sum of the first three is {_gib(plan.argument_bytes)} GiB "
        f"({held / plan.argument_bytes - 1:+.1%}); without the padding of layouts they are "
        f"{_gib(plan.stored_bytes)} GiB",
        "",
        "FLOPs per byte of training",
        *_rows([[name, f"{n:,.0f}", "FLOP"] for name, n in plan.flops_per_byte.items()]),
        "",
        f"Collectives per update, and what each {device} sends",
        *_exchanges(plan),
        "",
        *_roofline(plan),
        "",
        *_budget(plan),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _roofline(plan: Plan) -> list[str]:
    times, rates = plan.times, plan.rates
    flops = plan.flops_per_byte["compiled"] * plan.batch_size * plan.seq_len / plan.devices
    rows = [
        ["compute", _ms(times.compute), f"ms: {flops:.3g} FLOP at {rates.flops:.3g} FLOP/s"],
        [
            "memory",
            _ms(times.memory),
            f"ms: {plan.traffic_bytes:.3g} bytes at {rates.memory:.3g} bytes/s",
        ],
    ]
    if times.interconnect is not None:
        sent = sum(exchange.sent_bytes for exchange in plan.collectives)
        rows.append(
            [
                "interconnect",
                _ms(times.interconnect),
                f"ms: {sent:.3g} bytes at {rates.link or 0:.3g} bytes/s and link",
            ]
        )
    lines = [
        f"Roofline of an update ({rates.source}): a bound and no promise",
        *_rows(rows),
        f"  bound by {times.bound}: at least {_ms(times.seconds)} ms with all of it at the same "
        f"time, {_ms(times.apart)} ms with none",
    ]
    if plan.compiler_seconds:
        lines.append(
            f"  the compiler's own estimate, without collectives: {_ms(plan.compiler_seconds)} ms"
        )
    if plan.transfer_bytes:
        lines.append(f"  between device and host: {_gib(plan.transfer_bytes)} GiB, not in the time")
    return lines + [f"  {note}" for note in plan.notes]


def _budget(plan: Plan) -> list[str]:
    total = plan.num_steps * plan.batch_size * plan.seq_len
    model_flops = plan.flops_per_byte["formula"] * plan.bytes_per_second
    return [
        f"Budget of {plan.num_steps:,} updates, {total:,} bytes, at that bound",
        *_rows(
            [
                ["speed", f"{plan.bytes_per_second:,.0f}", "bytes/s"],
                ["time", f"{plan.days:,.2f}", "days"],
                ["cost", f"{plan.chip_hours:,.1f}", f"{_unit(plan)}-hours"],
                [
                    "model FLOPs utilisation",
                    f"{100 * model_flops / (plan.devices * plan.rates.flops):.0f}",
                    "%, at most",
                ],
            ]
        ),
    ]


def _exchanges(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["  none"]
    return _rows(
        [
            [
                f"{x.kind} over {x.axes or 'one device'}",
                f"{x.count:,}",
                f"{x.sent_bytes / 2**20:,.1f}",
                "MiB" + ("" if x.seconds is None else f", {_ms(x.seconds)} ms"),
            ]
            for x in plan.collectives
        ]
    )


def table(plans: Sequence[tuple[str, Plan]]) -> str:
    """Plans in the order given, each with the flags that make it."""
    rows = [
        ["", "ms", "bytes/s", "GiB", "days", f"{_unit(plans[0][1])}-hours", "bound by", "flags"]
    ]
    for rank, (flags, plan) in enumerate(plans, 1):
        rows.append(
            [
                f"{rank}.",
                _ms(plan.times.seconds),
                f"{plan.bytes_per_second:,.0f}",
                _gib(plan.memory_bytes["total"]),
                f"{plan.days:,.2f}",
                f"{plan.chip_hours:,.1f}",
                plan.times.bound,
                flags,
            ]
        )
    return "\n".join(_rows(rows))


def _unit(plan: Plan) -> str:
    return "device" if plan.chips is None else "chip"


def _rows(rows: list[list[str]]) -> list[str]:
    """Columns: the first and the last to the left, those between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join(["", f"{first:<{widths[0]}}", *cells, last]))
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
