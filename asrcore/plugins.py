"""Loads plug-ins and sends them events; the only place that uses a plug-in manager.

One bad plug-in never breaks the others: what is wrong with it is kept as a `BrokenPlugin` for `asr driver list`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import pluggy

from asrcore import driver as contract
from asrcore import hookspecs
from asrcore.errors import DriverIncompatible, DriverNotFound, InvalidSetting
from asrcore.model.event import FailoverKind, FinishedJob
from asrcore.model.health import Health
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection

if TYPE_CHECKING:
    import typer

__all__ = ["BrokenPlugin", "Plugins", "load", "load_named"]

_log = logging.getLogger(__name__)

# What a plug-in's own code may end with. SystemExit too: a module that ends the process at import is broken, no more.
_ITS_FAULT = (Exception, SystemExit)


@attrs.frozen
class BrokenPlugin:
    """A plug-in, or a driver of one, that is not used, and why. `distribution` is `name version`, "" if unknown."""

    name: str
    distribution: str
    error: str


class _Refused(Exception):
    """Says what is wrong with a plug-in."""


class Plugins:
    """The plug-ins in use. Safe to use from several threads once they are registered."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._drivers: dict[str, contract.Driver] = {}
        self._incompatible: dict[str, DriverIncompatible] = {}
        self._broken: list[BrokenPlugin] = []

    @property
    def drivers(self) -> Mapping[str, contract.Driver]:
        """Drivers by name."""
        return MappingProxyType(dict(sorted(self._drivers.items())))

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """What was refused, in the order it was met."""
        return tuple(self._broken)

    def driver(self, name: str) -> contract.Driver:
        """The driver of that name. Raises DriverNotFound, or DriverIncompatible if it is there but cannot be used."""
        if name in self._drivers:
            return self._drivers[name]
        raise self._incompatible.get(name) or DriverNotFound(driver=name)

    def connect(self, driver: str, name: str, settings: Mapping[str, str]) -> contract.Site:
        """Connect to a site with settings as they were entered. Raises as `driver` and `Driver.connect` do."""
        chosen = self._accepting(driver, settings)
        for setting in chosen.info.settings:
            if setting.required and not settings.get(setting.name):
                raise InvalidSetting(setting=setting.name, driver=driver, problem="is required")
        return chosen.connect(name, settings)

    def adopted(self, driver: str, name: str, settings: Mapping[str, str]) -> dict[str, str]:
        """The settings with those that the driver records besides. Raises as `driver` and `Driver.adopt` do."""
        merged = {**settings, **self._accepting(driver, settings).adopt(name, settings)}
        return {name: value for name, value in merged.items() if value != ""}

    def check(self, driver: str, settings: Mapping[str, str], record: Path | None = None) -> Generator[contract.Check]:
        """Test a driver at a site with settings as they were entered. Raises as `driver` and `Driver.check` do."""
        return self._accepting(driver, settings).check(settings, record)

    def _accepting(self, driver: str, settings: Mapping[str, str]) -> contract.Driver:
        """The driver, if it has all these settings: drivers leave that check to this place."""
        chosen = self.driver(driver)
        known = {setting.name for setting in chosen.info.settings}
        for name in settings:
            if name not in known:
                names = ", ".join(sorted(known))
                raise InvalidSetting(setting=name, driver=driver, problem=f"unknown; there are: {names}")
        return chosen

    def register(self, name: str, plugin: object, distribution: str = "") -> bool:
        """Take a plug-in (a module or any object with hooks) into use; False if it was refused (see `broken`)."""
        full_name = f"{distribution}:{name}"  # entry points of two distributions may have the same name
        if self._manager.has_plugin(full_name) or self._manager.is_registered(plugin):
            self._refuse(name, distribution, _Refused("it is already registered"))
            return False
        try:
            self._manager.register(plugin, full_name)
            self._check_hooks(full_name)
            drivers = self._offered(full_name)
        except _ITS_FAULT as problem:
            if self._manager.has_plugin(full_name):  # registered half-way
                self._manager.unregister(name=full_name)
            self._refuse(name, distribution, problem)
            return False
        for driver in drivers:
            self._take(driver, name, distribution)
        return True

    def commands(self) -> dict[str, typer.Typer]:
        """Commands that plug-ins offer, by the plug-in's name. One that cannot offer them is in `broken`."""
        import typer  # noqa: PLC0415 - only the command line needs it

        found: dict[str, typer.Typer] = {}
        for caller, implementation in self._implementations():
            if caller == "asr_register_commands":
                distribution, _, name = implementation.plugin_name.partition(":")
                try:
                    offered = implementation.function()
                    if not isinstance(offered, typer.Typer):
                        raise _Refused(f"{caller} returned {offered!r}, not a typer.Typer")
                    if name in found:
                        raise _Refused(f"commands {name!r} are already offered by another plug-in, which stays in use")
                except _ITS_FAULT as problem:
                    self._refuse(name, distribution, problem)
                else:
                    found[name] = offered
        return found

    def _check_hooks(self, full_name: str) -> None:
        self._manager.check_pending()
        for caller, implementation in self._implementations():
            if implementation.plugin_name != full_name:
                continue
            function = implementation.function
            for parameter in inspect.signature(function).parameters.values():
                # pluggy refuses unknown names, but says nothing of those that it never passes.
                if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
                    raise _Refused(f"{caller}: parameter `{parameter}` would never be passed; write a plain name")
            if implementation.wrapper or implementation.hookwrapper:
                raise _Refused(f"{caller}: hook wrappers are not supported")
            if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
                raise _Refused(f"{caller}: a generator or coroutine function would never run")

    def _implementations(self) -> Iterator[tuple[str, pluggy.HookImpl]]:
        for name in hookspecs.__all__:
            if name.startswith("asr_"):
                caller: pluggy.HookCaller = getattr(self._manager.hook, name)
                for implementation in caller.get_hookimpls():
                    yield name, implementation

    def _offered(self, full_name: str) -> list[contract.Driver]:
        drivers: list[contract.Driver] = []
        for caller, implementation in self._implementations():
            if caller == "asr_register_drivers" and implementation.plugin_name == full_name:
                offered = implementation.function()
                if not isinstance(offered, list | tuple):
                    raise _Refused(f"asr_register_drivers returned {offered!r}, not a list of drivers")
                for driver in offered:
                    info = getattr(driver, "info", None)
                    if not isinstance(driver, contract.Driver) or not isinstance(info, contract.DriverInfo):
                        raise _Refused(f"asr_register_drivers returned {driver!r}, not a Driver with an info")
                    drivers.append(driver)
        return drivers

    def _take(self, driver: contract.Driver, plugin: str, distribution: str) -> None:
        name, theirs = driver.info.name, driver.info.api
        if theirs[0] != contract.API[0]:
            ours = ".".join(map(str, contract.API))
            problem = DriverIncompatible(driver=name, theirs=".".join(map(str, theirs)), ours=ours)
            self._incompatible.setdefault(name, problem)
            self._refuse(plugin, distribution, problem)
        elif name in self._drivers:
            taken = _Refused(f"driver {name!r} is already offered by another plug-in, which stays in use")
            self._refuse(plugin, distribution, taken)
        else:
            self._drivers[name] = driver

    def _refuse(self, name: str, distribution: str, problem: BaseException) -> None:
        error = str(problem) if isinstance(problem, _Refused) else f"{type(problem).__name__}: {problem}"
        self._broken.append(BrokenPlugin(name, distribution, error))
        _log.warning("plug-in %s of %s: %s", name, distribution or "this process", error)

    # -- events

    def recovery_point_created(self, machine: Protection, point: RecoveryPoint) -> None:
        """See `hookspecs.asr_recovery_point_created`; so for the others."""
        self._tell("asr_recovery_point_created", machine=machine, point=point)

    def health_changed(self, machine: Protection, old: Health, new: Health) -> None:
        """Report that a machine's health has changed."""
        self._tell("asr_health_changed", machine=machine, old=old, new=new)

    def before_failover(self, machine: Protection, kind: FailoverKind) -> None:
        """Report that a failover begins."""
        self._tell("asr_before_failover", machine=machine, kind=kind)

    def after_failover(self, machine: Protection, kind: FailoverKind) -> None:
        """Report that a failover is done."""
        self._tell("asr_after_failover", machine=machine, kind=kind)

    def job_finished(self, job: FinishedJob) -> None:
        """Report that a job ended."""
        self._tell("asr_job_finished", job=job)

    def _tell(self, event: str, **values: object) -> None:
        # One by one, not through pluggy's own call: that ends at the first exception.
        caller: pluggy.HookCaller = getattr(self._manager.hook, event)
        for implementation in reversed(caller.get_hookimpls()):
            try:
                implementation.function(*(values[name] for name in implementation.argnames))
            except _ITS_FAULT:
                _log.exception("plug-in %s failed at %s; the engine continues", implementation.plugin_name, event)


def load() -> Plugins:
    """Load the plug-ins of all installed distributions: the entry points of group `asrcore`, one by one."""
    return _load(None)


def load_named(name: str) -> Plugins:
    """Load the plug-ins whose entry point has this name, and no other."""
    return _load(name)


def _load(name: str | None) -> Plugins:
    plugins = Plugins()
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if _wanted(point, name)]
            if points:  # the first on the path hides others of its name, as it does for `import`
                found.setdefault(re.sub(r"[-_.]+", "-", distribution.name).lower(), distribution)
        except Exception as problem:  # noqa: BLE001 - a damaged installation of something, perhaps not even ours
            _log.debug("skipping a distribution that cannot be read: %s: %s", type(problem).__name__, problem)
    for _, distribution in sorted(found.items()):
        title = f"{distribution.name} {distribution.version}"
        for point in sorted(distribution.entry_points, key=lambda point: point.name):
            if _wanted(point, name):
                _load_one(plugins, point, title)
    return plugins


def _wanted(point: importlib.metadata.EntryPoint, name: str | None) -> bool:
    return point.group == hookspecs.PROJECT and name in (None, point.name)


def _load_one(plugins: Plugins, point: importlib.metadata.EntryPoint, distribution: str) -> None:
    try:
        plugin = point.load()
    except _ITS_FAULT as problem:
        plugins._refuse(point.name, distribution, problem)
    else:
        plugins.register(point.name, plugin, distribution)
