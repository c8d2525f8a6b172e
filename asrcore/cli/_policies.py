"""`asr policy`: how often, how consistent, what is kept."""

from __future__ import annotations

from typing import Annotated, Any

import attrs
import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
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


Interval = Annotated[str | None, typer.Option(help="Time between replication cycles: 5s to 1d.")]
Keep = Annotated[str | None, typer.Option(help="Delete recovery points older than this, up to 365d.")]
PointEvery = Annotated[
    str | None, typer.Option(help="Time between kept recovery points; in between, only the latest one exists.")
]
WantedConsistency = Annotated[str | None, typer.Option(help="crash, filesystem or application.")]
FreezeLimit = Annotated[str | None, typer.Option(help="Longest time that a guest may be frozen: 1s to 60s.")]
ResyncWindow = Annotated[
    str | None, typer.Option(help="When a comparison may start automatically: HH:MM-HH:MM local time, or always.")
]
ResyncThreshold = Annotated[
    float | None, typer.Option(help="Compare the replica when the change log covers this share of a disk.")
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        help="Limit for all its machines together, such as 20Mbit or 20Mbit@08:00-18:00 (local time), or unlimited; "
        "repeatable: the lowest active limit applies."
    ),
]
VerifyEvery = Annotated[
    str | None,
    typer.Option(help="Verify and repair replicas automatically this often, in the resync window; or never."),
]
ScrubEvery = Annotated[
    str | None,
    typer.Option(
        help="Read kept recovery points at the target this often, and compare them with the digests that were recorded "
        "of them, in the resync window; or never."
    ),
]


@_policy.command("create")
def policy_create(
    context: typer.Context,
    name: PolicyName,
    interval: Interval = "5min",
    keep: Keep = "24h",
    point_every: Annotated[
        str,
        typer.Option(
            help="Time between kept recovery points; in between, only the latest one exists.",
            show_default="5min",
        ),
    ] = "",
    consistency: WantedConsistency = "crash",
    freeze_limit: FreezeLimit = "10s",
    resync_window: ResyncWindow = "18:30-06:00",
    resync_threshold: ResyncThreshold = 0.5,
    bandwidth: Limit = None,
    verify_every: VerifyEvery = "7d",
    scrub_every: ScrubEvery = "7d",
    as_json: Json = False,
) -> None:
    """Create a policy."""
    given = _parsed(
        interval,
        keep,
        point_every or None,
        consistency,
        freeze_limit,
        resync_window,
        resync_threshold,
        verify_every,
        scrub_every,
    )
    every, age = given["interval"], given["keep"]
    given.setdefault("point_interval", max(every, min(300.0, age)))
    policy = Policy(name=name, bandwidth=_limits(bandwidth) or (), **given)
    with _session.engine(context) as opened:
        opened.vault.add_policy(policy)
        _output.show(policy, f"policy {name} created: {_described(policy)}", as_json=as_json)


@_policy.command("set")
def policy_set(
    context: typer.Context,
    name: PolicyName,
    interval: Interval = None,
    keep: Keep = None,
    point_every: PointEvery = None,
    consistency: WantedConsistency = None,
    freeze_limit: FreezeLimit = None,
    resync_window: ResyncWindow = None,
    resync_threshold: ResyncThreshold = None,
    bandwidth: Limit = None,
    verify_every: VerifyEvery = None,
    scrub_every: ScrubEvery = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Change a policy, for all machines that use it.

    A running service applies the change within seconds. Recovery points stay; those that the policy no longer keeps are
    deleted by the next cycles.
    """
    changes = _parsed(
        interval,
        keep,
        point_every,
        consistency,
        freeze_limit,
        resync_window,
        resync_threshold,
        verify_every,
        scrub_every,
    )
    limits = _limits(bandwidth)
    if limits is not None:
        changes["bandwidth"] = limits
    if not changes:
        raise InvalidValue(what="change", value="", wanted="at least one option, such as --interval 30s")
    with _session.engine(context) as opened:
        policy = attrs.evolve(opened.vault.policy(name), **changes)
        plan = opened.policy_impact(policy)
        if not agreed(plan, yes=yes, dry_run=dry_run, as_json=as_json):
            return
        opened.update_policy(policy)
        _output.show({"policy": policy, "plan": plan.document()}, f"{plan}\npolicy {name} changed", as_json=as_json)


@_policy.command("remove")
def policy_remove(
    context: typer.Context, name: PolicyName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Remove a policy that no protected machine uses."""
    with _session.engine(context) as opened:
        if agreed(opened.impact("policy-remove", name), yes=yes, dry_run=dry_run, as_json=as_json):
            opened.remove_policy(name)
            _output.show({"removed": name}, f"policy {name} removed", as_json=as_json)


def _parsed(
    interval: str | None,
    keep: str | None,
    point_every: str | None,
    consistency: str | None,
    freeze_limit: str | None,
    resync_window: str | None,
    resync_threshold: float | None,
    verify_every: str | None,
    scrub_every: str | None,
) -> dict[str, Any]:
    """Fields of a policy, of the options that were given."""
    found = {
        "interval": interval and parse_duration(interval, "interval"),
        "point_interval": point_every and parse_duration(point_every, "point interval"),
        "keep": keep and parse_duration(keep, "keep"),
        "consistency": consistency and _consistency(consistency),
        "freeze_limit": freeze_limit and parse_duration(freeze_limit, "freeze limit"),
        "resync_window": resync_window and Window.parse(resync_window),
        "resync_threshold": resync_threshold,
        "verify_every": verify_every and _every(verify_every, "verification interval"),
        "scrub_every": scrub_every and _every(scrub_every, "scrub interval"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _every(text: str, what: str) -> float:
    return 0.0 if text == "never" else parse_duration(text, what)


def _consistency(text: str) -> Consistency:
    try:
        return Consistency(text)
    except ValueError:
        wanted = "crash, filesystem or application"
        raise InvalidValue(what="consistency", value=text, wanted=wanted) from None


def _limits(rules: list[str] | None) -> tuple[Bandwidth, ...] | None:
    return None if not rules else () if rules == ["unlimited"] else tuple(map(Bandwidth.parse, rules))


def _described(policy: Policy) -> str:
    return (
        f"one cycle every {format_duration(policy.interval)}, one recovery point kept every "
        f"{format_duration(policy.point_interval)} for {format_duration(policy.keep)}, "
        f"{policy.consistency.value}-consistent, resync {policy.resync_window}, bandwidth {_bandwidth(policy)}, "
        f"verified {_often(policy.verify_every)}, scrubbed {_often(policy.scrub_every)}"
    )


def _often(every: float) -> str:
    return f"every {format_duration(every)}" if every else "never automatically"


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
                _often(item.verify_every),
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
