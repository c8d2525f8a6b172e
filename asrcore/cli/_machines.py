"""`asr machine`: change what was said at `protect`; record what a target knows better."""

from __future__ import annotations

from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._options import MachineName, networks_of
from asrcore.cli._output import Json
from asrcore.errors import InvalidValue

__all__ = ["register"]

_machine = typer.Typer(
    help="Protected machines: change policy and networks, or record what the target holds.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_machine, name="machine")


@_machine.command("set")
def machine_set(
    context: typer.Context,
    machine: MachineName,
    policy: Annotated[str | None, typer.Option(help="Replication policy.")] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE=TARGET: network at the target for a network of the source; SOURCE= removes the entry; "
            "repeatable."
        ),
    ] = None,
    test_network: Annotated[
        str | None, typer.Option(help="Network for test failovers; an empty one is an isolated network.")
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Change policy, network mapping or test network of a protected machine. Its recovery points stay."""
    if policy is None and not network and test_network is None:
        raise InvalidValue(what="change", value="", wanted="at least one of --policy, --network, --test-network")
    networks = networks_of(network, may_be_empty=True)
    with _session.engine(context) as opened:
        plan = opened.machine_impact(machine, policy=policy, networks=networks, test_network=test_network)
        if not agreed(plan, yes=yes, dry_run=dry_run, as_json=as_json):
            return
        changed = opened.update_machine(machine, policy=policy, networks=networks, test_network=test_network)
        document = {
            "machine": changed.name,
            "policy": changed.policy,
            "networks": changed.networks.networks,
            "test_network": changed.test_network,
            "plan": plan.document(),
        }
        _output.show(document, f"{plan}\n{changed.name} changed", as_json=as_json)


@_machine.command("adopt")
def machine_adopt(
    context: typer.Context, machine: MachineName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Record what the target holds, after the vault was restored from a backup: recovery points, a failover.

    Needed where `vault-behind` is reported.
    """
    from asrcore.procedures.adopt import adopt_impact  # noqa: PLC0415 - and the driver contract with it

    with _session.engine(context) as opened:
        if agreed(adopt_impact(opened.context, machine), yes=yes, dry_run=dry_run, as_json=as_json):
            _session.finish(opened, opened.adopt(machine), as_json=as_json)
