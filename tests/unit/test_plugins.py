"""Plug-ins of real distributions, made in a temporary directory on the import path."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import attrs
import pytest

from asrcore import driver as contract
from asrcore import hookspecs, plugins
from asrcore.cli import main
from asrcore.errors import DriverIncompatible, DriverNotFound, InvalidSetting
from asrcore.model.event import FailoverKind, FinishedJob, Outcome
from asrcore.model.finding import Finding, Severity
from asrcore.model.health import Health
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.protection import Protection

Install = Callable[..., None]

PROJECT = Path(plugins.__file__).parents[1]

MACHINE = Protection(
    id="p1",
    name="web",
    policy="gold",
    home_site="paris",
    source_site="paris",
    source_machine="m1",
    target_site="lyon",
    replica_id="r1",
)
POINT = RecoveryPoint("pt1", 1.0, 2.0, Consistency.CRASH, kept=True)

DRIVER = """
    from asrcore.driver import API, Driver, DriverInfo
    from asrcore.hookspecs import hookimpl

    class Sample(Driver):
        info = DriverInfo({name!r}, "Sample", "1.0", {api}, frozenset())

        def connect(self, name, settings):
            raise NotImplementedError

    @hookimpl
    def asr_register_drivers():
        return [Sample()]
"""


def driver_source(name: str, api: str = "API") -> str:
    return DRIVER.format(name=name, api=api)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one module as its entry point, as pip would lay it out."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(distribution: str, source: str, *, entry: str | None = None, value: str | None = None) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[asrcore]\n{entry or distribution} = {value or module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def broken_of(loaded: plugins.Plugins, name: str) -> list[plugins.BrokenPlugin]:
    return [item for item in loaded.broken if item.name == name]


def test_driver_of_an_entry_point_is_found(install: Install) -> None:
    install("sample-good", driver_source("good"))
    loaded = plugins.load()
    assert loaded.driver("good").info.title == "Sample"
    assert "good" in loaded.drivers
    assert not broken_of(loaded, "sample-good")


def test_unknown_driver_is_a_catalogued_error() -> None:
    with pytest.raises(DriverNotFound, match="there is no driver 'nope'"):
        plugins.Plugins().driver("nope")


class Reached(Exception):
    """The driver was asked."""


class Strict(contract.Driver):
    """Has one required setting and one that is not; raises Reached when it is asked for anything."""

    info = contract.DriverInfo(
        "strict",
        "Strict",
        "1.0",
        contract.API,
        frozenset(),
        settings=(contract.Setting("uri", "where", required=True), contract.Setting("user", "who")),
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> contract.Site:
        raise Reached

    def check(self, settings: Mapping[str, str], record: Path | None = None) -> Generator[contract.Check]:
        raise Reached

    @hookspecs.hookimpl
    def asr_register_drivers(self) -> list[contract.Driver]:
        return [self]


@pytest.fixture
def strict() -> plugins.Plugins:
    loaded = plugins.Plugins()
    assert loaded.register("strict", Strict()), loaded.broken
    return loaded


def test_unknown_settings_never_reach_a_driver(strict: plugins.Plugins) -> None:
    given = {"uri": "here", "colour": "red"}
    for asked in (lambda: strict.connect("strict", "a", given), lambda: strict.check("strict", given)):
        with pytest.raises(InvalidSetting, match="'colour' of driver strict: unknown; there are: uri, user") as caught:
            asked()
        assert caught.value.attributes["setting"] == "colour"


@pytest.mark.parametrize("given", [{}, {"uri": ""}, {"user": "me"}])
def test_a_driver_is_connected_with_all_required_settings_only(strict: plugins.Plugins, given: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting, match="'uri' of driver strict: is required"):
        strict.connect("strict", "a", given)


def test_known_settings_reach_the_driver(strict: plugins.Plugins) -> None:
    with pytest.raises(Reached):
        strict.connect("strict", "a", {"uri": "here"})
    with pytest.raises(Reached):
        strict.check("strict", {})  # the driver says first whether it has such checks


BROKEN = {
    "syntax": ("def (", "SyntaxError"),
    "import": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "raises": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_register_drivers():\n    raise OSError('no luck')",
        "OSError: no luck",
    ),
    "not-a-list": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_register_drivers():\n    return None",
        "returned None, not a list",
    ),
    "not-a-driver": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_register_drivers():\n    return ['x']",
        "returned 'x', not a Driver",
    ),
    "misspelt-hook": (
        driver_source("half") + "\n    @hookimpl\n    def asr_job_finnished(job):\n        pass\n",
        "asr_job_finnished",
    ),
    "misspelt-parameter": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_job_finished(jbo):\n    pass",
        "jbo",
    ),
    "default": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_job_finished(job=None):\n    pass",
        "parameter `job=None` would never be passed",
    ),
    "keyword-only": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_job_finished(*, job):\n    pass",
        "parameter `job` would never be passed",
    ),
    "generator": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl\ndef asr_job_finished(job):\n    yield",
        "would never run",
    ),
    "wrapper": (
        "from asrcore.hookspecs import hookimpl\n@hookimpl(wrapper=True)\n"
        "def asr_job_finished(job):\n    return (yield)",
        "wrappers are not supported",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_is_named_and_the_others_work(case: str, install: Install) -> None:
    source, expected = BROKEN[case]
    install("a-first", driver_source("first"))
    install("broken-one", source)
    install("z-last", driver_source("last"))
    loaded = plugins.load()
    (broken,) = broken_of(loaded, "broken-one")
    assert broken.distribution == "broken-one 1.2"
    assert expected in broken.error
    assert {"first", "last"} <= set(loaded.drivers)
    assert "half" not in loaded.drivers


def test_entry_point_to_nothing_is_reported(install: Install) -> None:
    install("no-target", "", value="no_target:missing")
    (broken,) = broken_of(plugins.load(), "no-target")
    assert "missing" in broken.error


def test_unreadable_entry_points_of_any_distribution_hurt_nobody(install: Install, tmp_path: Path) -> None:
    install("z-last", driver_source("last"))
    info = tmp_path / "damaged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(b"[asrcore]\nnonsense \xff\n")
    assert "last" in plugins.load().drivers


def test_second_driver_of_a_name_is_reported_and_the_first_stays(install: Install) -> None:
    install("a-first", driver_source("same"))
    install("b-second", driver_source("same"))
    loaded = plugins.load()
    assert type(loaded.driver("same")).__module__ == "a_first"
    assert "already offered" in broken_of(loaded, "b-second")[0].error


def test_same_entry_point_name_of_two_distributions_is_fine(install: Install) -> None:
    install("a-first", driver_source("one"), entry="same")
    install("b-second", driver_source("two"), entry="same")
    loaded = plugins.load()
    assert {"one", "two"} <= set(loaded.drivers)
    assert not broken_of(loaded, "same")


@pytest.mark.parametrize(("api", "refused"), [("(API[0] + 1, 0)", True), ("(API[0], 99)", False)])
def test_driver_of_another_major_is_refused_and_says_so(api: str, refused: bool, install: Install) -> None:
    install("other-api", driver_source("other", api))
    loaded = plugins.load()
    assert ("other" not in loaded.drivers) is refused
    if refused:
        with pytest.raises(DriverIncompatible, match=r"has contract version 2\.0, this engine has 1\.0"):
            loaded.driver("other")
        assert "DriverIncompatible" in broken_of(loaded, "other-api")[0].error


def test_registering_twice_keeps_the_first() -> None:
    class Nothing:
        """A plug-in without hooks."""

    loaded, plugin = plugins.Plugins(), Nothing()
    assert loaded.register("mine", plugin)
    assert not loaded.register("mine", plugin)
    assert not loaded.register("again", plugin)
    assert [item.error for item in loaded.broken] == ["it is already registered"] * 2


class Recorder:
    """Receives every event, each with its parameters in a different order from the specification."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    @hookspecs.hookimpl
    def asr_recovery_point_created(self, point: RecoveryPoint, machine: Protection) -> None:
        self.seen.append(("point", machine, point))

    @hookspecs.hookimpl
    def asr_health_changed(self, new: Health) -> None:
        self.seen.append(("health", new))

    @hookspecs.hookimpl
    def asr_before_failover(self, machine: Protection, kind: FailoverKind) -> None:
        self.seen.append(("before", machine, kind))

    @hookspecs.hookimpl
    def asr_after_failover(self) -> None:
        self.seen.append(("after",))

    @hookspecs.hookimpl
    def asr_job_finished(self, job: FinishedJob) -> None:
        self.seen.append(("job", job))


class Exploder:
    """Fails at every event."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @hookspecs.hookimpl
    def asr_recovery_point_created(self, machine: Protection) -> None:
        raise self.error


def test_events_reach_every_plugin_with_the_parameters_it_asks_for() -> None:
    loaded, recorder = plugins.Plugins(), Recorder()
    loaded.register("recorder", recorder)
    worse = Health((Finding("x", Severity.WARNING, "w", "c", "a"),))
    job = FinishedJob("j1", "failover-test", "web", Outcome.SUCCEEDED, 1.0, 2.0)
    loaded.recovery_point_created(MACHINE, POINT)
    loaded.health_changed(MACHINE, Health(), worse)
    loaded.before_failover(MACHINE, FailoverKind.PLANNED)
    loaded.after_failover(MACHINE, FailoverKind.PLANNED)
    loaded.job_finished(job)
    assert recorder.seen == [
        ("point", MACHINE, POINT),
        ("health", worse),
        ("before", MACHINE, FailoverKind.PLANNED),
        ("after",),
        ("job", job),
    ]


@pytest.mark.parametrize("error", [ValueError("bang"), SystemExit(1)], ids=["exception", "exit"])
def test_failing_listener_is_logged_and_the_others_hear(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    loaded, before, after = plugins.Plugins(), Recorder(), Recorder()
    loaded.register("before", before)
    loaded.register("exploder", Exploder(error))
    loaded.register("after", after)
    with caplog.at_level(logging.ERROR):
        loaded.recovery_point_created(MACHINE, POINT)
    assert len(before.seen) == len(after.seen) == 1
    assert "exploder failed at asr_recovery_point_created" in caplog.text


def test_interrupt_by_the_user_is_not_swallowed() -> None:
    loaded = plugins.Plugins()
    loaded.register("exploder", Exploder(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loaded.recovery_point_created(MACHINE, POINT)


def test_importing_loads_no_plugin(install: Install, tmp_path: Path) -> None:
    install("noisy-one", f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    code = "import asrcore, asrcore.plugins, asrcore.hookspecs"
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=60, env={"PYTHONPATH": f"{tmp_path}:{PROJECT}"})
    assert not (tmp_path / "imported").exists()


def test_every_event_has_a_teller() -> None:
    events = {name.removeprefix("asr_") for name in hookspecs.__all__ if name.startswith("asr_")}
    tellers = {name for name in vars(plugins.Plugins) if not name.startswith("_")}
    assert events - {"register_drivers", "register_commands"} <= tellers


def test_values_of_events_are_frozen() -> None:
    job = FinishedJob("j1", "run", "", Outcome.FAILED, 1.0, 2.0, {"code": "x"})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        job.id = "j2"  # type: ignore[misc]
    assert contract.API[0] == 1


# -- commands --------------------------------------------------------------------------------------------------------

COMMANDS = """
    import typer
    from asrcore.errors import InvalidValue
    from asrcore.hookspecs import hookimpl

    app = typer.Typer(help="Sample commands.\\n\\nMore about them.")

    @app.command()
    def greet(context: typer.Context, name: str, as_json: bool = typer.Option(False, "--json")):
        if name == "nobody":
            raise InvalidValue(what="name", value=name, wanted="a name")
        print({"vault": context.obj, "name": name} if as_json else f"hello {name}")

    @hookimpl
    def asr_register_commands():
        return app
"""

Asr = Callable[..., tuple[int, str]]


@pytest.fixture
def asr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Asr:
    """Runs `asr` in this process; returns its exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["asr", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def test_commands_of_a_plugin_are_called_by_its_name_and_end_as_verbs_do(install: Install, asr: Asr) -> None:
    install("sample", COMMANDS)
    assert asr("sample", "greet", "web") == (0, "hello web\n")
    assert asr("sample", "greet", "web", "--json", "--vault", "x") == (0, "{'vault': 'x', 'name': 'web'}\n")
    code, said = asr("sample", "greet", "nobody")
    assert code == 2
    assert said.startswith("error [invalid-value]")
    assert '"code": "invalid-value"' in asr("sample", "greet", "nobody", "--json")[1]


def test_help_lists_the_commands_of_plugins_by_their_first_line(install: Install, asr: Asr) -> None:
    install("sample", COMMANDS)
    code, said = asr("--help")
    assert code == 0
    assert re.search(r"^│ sample +Sample commands\. ", said, re.MULTILINE)
    assert "More about them" not in said


def test_only_the_plugin_that_is_named_is_loaded(install: Install, asr: Asr, tmp_path: Path) -> None:
    install("sample", COMMANDS)
    install("other", "import pathlib\npathlib.Path(__file__).with_name('loaded').touch()")
    asr("sample", "greet", "web")
    assert asr("smaple")[0] == 2
    assert not (tmp_path / "loaded").exists()
    plugins.load()
    assert (tmp_path / "loaded").exists()


BROKEN_COMMANDS = {
    "import": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "raises": (COMMANDS.replace("return app", "raise OSError('no luck')"), "OSError: no luck"),
    "another-type": (COMMANDS.replace("return app", "return 'app'"), "returned 'app', not a typer.Typer"),
    "unknown-parameter": (COMMANDS.replace("name: str", "name: object"), "RuntimeError"),
}


@pytest.mark.parametrize("how", BROKEN_COMMANDS)
def test_broken_commands_are_named_and_asr_works(install: Install, asr: Asr, how: str) -> None:
    source, problem = BROKEN_COMMANDS[how]
    install("a-broken-one", source)
    install("sample", COMMANDS)
    code, said = asr("a-broken-one", "greet", "web")
    assert code == 11
    assert "error [plugin-failed]: the commands of plug-in 'a-broken-one' cannot be used" in said
    assert problem in said
    code, said = asr("--help")
    assert code == 0
    assert re.search(r"^│ sample ", said, re.MULTILINE)
    assert not re.search(r"^│ a-broken-one ", said, re.MULTILINE)
    assert asr("sample", "greet", "web") == (0, "hello web\n")


def test_of_two_plugins_of_one_name_the_first_keeps_its_commands(install: Install) -> None:
    install("sample-a", COMMANDS, entry="sample")
    install("sample-b", COMMANDS, entry="sample")
    loaded = plugins.load_named("sample")
    assert loaded.commands()["sample"] is sys.modules["sample_a"].app
    assert [item.distribution for item in broken_of(loaded, "sample")] == ["sample-b 1.2"]


def test_a_verb_takes_precedence_over_a_plugin(install: Install, asr: Asr) -> None:
    install("sample", COMMANDS, entry="status")
    assert "--watch" in asr("status", "--help")[1]
    assert "Sample commands" not in asr("--help")[1]
