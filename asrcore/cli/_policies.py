"""`asr policy`: how often, how consistent, what is kept."""

from __future__ import annotations

from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._options import PolicyName
from asrcore.cli._output import Json
from asrcore.errors import InvalidValue
from asrcore.model.point import Consistency
from asrcore.model.policy import Bandwidth, Policy, Window
from asrcore.units import format_duration, parse_duration

__all__ = ["register"]

_policy = typer.Typer(help="Policies: how often, how consistent, what is kept.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_policy, name="policy")


@_policy.command("create")
def policy_create(
    context: typer.Context,
    name: PolicyName,
    interval: Annotated[str, typer.Option(help="Time between replication cycles: 5s to 1d.")] = "5min",
    keep: Annotated[str, typer.Option(help="Delete recovery points older than this, up to 365d.")] = "24h",
    point_every: Annotated[
        str,
        typer.Option(
            help="Time between kept recovery points; in between, only the latest one exists.",
            show_default="5min",
        ),
    ] = "",
    consistency: Annotated[str, typer.Option(help="crash, filesystem or application.")] = "crash",
    freeze_limit: Annotated[str, typer.Option(help="Longest time that a guest may be frozen: 1s to 60s.")] = "10s",
    resync_window: Annotated[
        str, typer.Option(help="When a comparison may start automatically: HH:MM-HH:MM local time, or always.")
    ] = "18:30-06:00",
    resync_threshold: Annotated[
        float, typer.Option(help="Compare the replica when the change log covers this share of a disk.")
    ] = 0.5,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit for all its machines together, such as 20Mbit or 20Mbit@08:00-18:00 (local time); "
            "repeatable: the lowest active limit applies."
        ),
    ] = None,
    verify_every: Annotated[
        str, typer.Option(help="Verify and repair replicas automatically this often, in the resync window; or never.")
    ] = "7d",
    as_json: Json = False,
) -> None:
    """Create a policy."""
    every = parse_duration(interval, "interval")
    age = parse_duration(keep, "keep")
    try:
        asked = Consistency(consistency)
    except ValueError:
        wanted = "crash, filesystem or application"
        raise InvalidValue(what="consistency", value=consistency, wanted=wanted) from None
    policy = Policy(
        name=name,
        interval=every,
        point_interval=parse_duration(point_every, "point interval") if point_every else max(every, min(300.0, age)),
        keep=age,
        consistency=asked,
        freeze_limit=parse_duration(freeze_limit, "freeze limit"),
        resync_window=Window.parse(resync_window),
        resync_threshold=resync_threshold,
        bandwidth=tuple(Bandwidth.parse(rule) for rule in bandwidth or []),
        verify_every=0.0 if verify_every == "never" else parse_duration(verify_every, "verification interval"),
    )
    with _session.engine(context) as opened:
        opened.vault.add_policy(policy)
        _output.show(policy, f"policy {name} created: {_described(policy)}", as_json=as_json)


def _described(policy: Policy) -> str:
    return (
        f"one cycle every {format_duration(policy.interval)}, one recovery point kept every "
        f"{format_duration(policy.point_interval)} for {format_duration(policy.keep)}, "
        f"{policy.consistency.value}-consistent, resync {policy.resync_window}, bandwidth {_bandwidth(policy)}, "
        f"verified {_verified(policy)}"
    )


def _verified(policy: Policy) -> str:
    return f"every {format_duration(policy.verify_every)}" if policy.verify_every else "never automatically"


def _bandwidth(policy: Policy) -> str:
    return ", ".join(map(str, policy.bandwidth)) or "unlimited"


@_policy.command("list")
def policy_list(context: typer.Context, as_json: Json = False) -> None:
    """List the policies."""
    with _session.engine(context) as opened:
        policies = opened.vault.policies()
        if as_json:
            _output.show(policies, "", as_json=True)
            return
        rows = [
            (
                item.name,
                format_duration(item.interval),
                format_duration(item.point_interval),
                format_duration(item.keep),
                item.consistency.value,
                str(item.resync_window),
                _bandwidth(item),
                _verified(item),
            )
            for item in policies
        ]
        columns = ("POLICY", "INTERVAL", "POINT EVERY", "KEEP", "CONSISTENCY", "RESYNC", "BANDWIDTH", "VERIFIED")
        _output.table(columns, rows, empty="no policies; create one with `asr policy create`")


@_policy.command("show")
def policy_show(context: typer.Context, name: PolicyName, as_json: Json = False) -> None:
    """Show a policy with its retention of recovery points."""
    with _session.engine(context) as opened:
        policy = opened.vault.policy(name)
        lines = [f"{name}: {_described(policy)}", "  retention:"]
        lines += [
            f"    older than {format_duration(rung.after)}: one every {format_duration(rung.every)}"
            for rung in policy.ladder
            if rung.after < policy.keep
        ]
        _output.show(policy, "\n".join(lines), as_json=as_json)
