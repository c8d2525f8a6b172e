"""Runs tests inside site b, which has the replicas and their file systems, and reports them as if they ran outside.

The pytest that was called (outside) passes each test of this folder to a second pytest, which is started inside the
site: `python -m drivers.libvirt.tests.conformance.inside ARGUMENTS`. A socket returns the reports, and the calls of the
lab that work only outside: the sites are isolated from each other and from the host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs
import pytest

from tests.lab import Lab
from tests.lab._run import LabError

__all__ = ["HERE", "NAME", "Inside", "Outside"]

HERE = Path(__file__).parent
NAME = "conformance-inside"
"""The name of the plug-in inside the site."""
END_SECONDS = 30.0
TEST_SECONDS = 150
"""Less than the project's limit, so that a test that hangs is reported by the pytest that runs it."""
LOG_BYTES = 4000


@attrs.frozen
class Call:
    """Calls a method of the lab; answered by Answer."""

    method: str
    arguments: tuple[object, ...]
    options: dict[str, object]


@attrs.frozen
class Answer:
    """`problem`: the text of a LabError."""

    value: object = None
    problem: str = ""


@attrs.frozen
class Report:
    """The report of a test's set-up, call or tear-down, as pytest serialises it."""

    data: dict[str, Any]


@attrs.frozen
class Done:
    """A test has ended."""

    nodeid: str


# -- outside ---------------------------------------------------------------------------------------------------------


class Outside:
    """Plug-in of the outer pytest: a lab and an inner pytest for each file of this folder.

    Not one for all: a worker of pytest-xdist knows every test, but gets files one by one and in any order.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._inner: _Inner | None = None
        config.add_cleanup(self._end)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> object:
        """Replaces pytest's own protocol for the tests of this folder."""
        if item.path.parent != HERE:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        call = pytest.CallInfo.from_call(lambda: self._run(item), when="call", reraise=KeyboardInterrupt)
        if call.excinfo is None:
            reports = call.result or []
        else:
            self._end()  # the inner one's state is unknown; a new one continues with the next test
            reports = [hook.pytest_runtest_makereport(item=item, call=call)]
        last = nextitem is None or nextitem.path != item.path
        after = pytest.CallInfo.from_call(lambda: self._leave(item, nextitem, last=last), when="teardown")
        if after.excinfo is not None:
            reports.append(hook.pytest_runtest_makereport(item=item, call=after))
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, item: pytest.Item) -> list[pytest.TestReport]:
        if os.geteuid() != 0:
            pytest.skip("the lab needs root")
        if self._inner is None:
            every = [other for other in item.session.items if other.path == item.path]
            self._inner = _Inner(item.config, every[every.index(item) :])
        return self._inner.reports(item)

    def _leave(self, item: pytest.Item, nextitem: pytest.Item | None, *, last: bool) -> None:
        # Tear down what earlier tests had set up, as pytest's own protocol does.
        item.session._setupstate.teardown_exact(nextitem)
        if last:
            self._end()

    def _end(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()


class _Inner:
    """A lab with a pytest inside site b that runs these tests in this order."""

    def __init__(self, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
        self._config = config
        with contextlib.ExitStack() as stack:
            self._lab = stack.enter_context(Lab(f"kit-{os.getpid()}"))
            self._log: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            self._link = stack.enter_context(Connection(ours.detach()))
            with theirs:
                self._process = self._lab.popen_in(
                    "b",
                    [sys.executable, "-m", __name__, *self._arguments(items)],
                    stdin=theirs.fileno(),
                    stdout=self._log.fileno(),
                    stderr=self._log.fileno(),
                    env={key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
                )
            stack.callback(self._stop)
            self._stack = stack.pop_all()

    def _arguments(self, items: Sequence[pytest.Item]) -> list[str]:
        inifile = ["-c", str(self._config.inipath)] if self._config.inipath else []
        options = [f"--rootdir={self._config.rootpath}", "-p", "no:cacheprovider", "-p", "no:randomly"]
        limit = ["-o", f"timeout={TEST_SECONDS}"]
        return [*inifile, *options, *limit, *(f"{item.path}::{item.nodeid.partition('::')[2]}" for item in items)]

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Follow a test to its end and run its calls of the lab. Raises LabError if that is impossible."""
        found = []
        while True:
            try:
                message = self._link.recv()
            except (EOFError, OSError) as error:
                raise LabError(f"the pytest inside site b has ended: {error!r}\n{self._said()}") from error
            match message:
                case Call(method, arguments, options):
                    self._link.send(self._answer(getattr(self._lab, method), arguments, options))
                case Report(data):
                    report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
                    if report.nodeid != item.nodeid:
                        raise LabError(f"inside site b {report.nodeid} ran instead of {item.nodeid}")
                    found.append(report)
                case Done():
                    return found

    def _answer(
        self, method: Callable[..., object], arguments: tuple[object, ...], options: dict[str, object]
    ) -> Answer:
        try:
            return Answer(method(*arguments, **options))
        except LabError as error:
            return Answer(problem=str(error))

    def _said(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        return self._log.read().decode(errors="replace")

    def _stop(self) -> None:
        self._link.close()  # what still runs inside fails at its next call of the lab
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS)

    def close(self) -> None:
        """Stop both."""
        self._stack.close()


# -- inside ----------------------------------------------------------------------------------------------------------


class _FarLab:
    """The lab's methods, run outside. Raises LabError."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    def __getattr__(self, method: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            self._link.send(Call(method, arguments, options))
            answer = self._link.recv()
            if answer.problem:
                raise LabError(answer.problem)
            return answer.value

        return call


class Inside:
    """Plug-in of the pytest inside the site. Its tests run one after the other, so the socket needs no lock."""

    def __init__(self, link: Connection) -> None:
        self.__name__ = NAME
        self.lab = cast(Lab, _FarLab(link))
        """The lab's methods, which run outside."""
        self._link = link
        self._config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        """Called by pytest."""
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest."""
        assert self._config is not None
        hook = self._config.hook
        self._link.send(Report(hook.pytest_report_to_serializable(config=self._config, report=report)))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Called by pytest."""
        self._link.send(Done(nodeid))


def main() -> int:
    """Run pytest with the socket that is standard input, because pytest replaces standard input."""
    link = Connection(os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return int(pytest.main(sys.argv[1:], plugins=[Inside(link)]))


if __name__ == "__main__":
    from drivers.libvirt.tests.conformance import inside

    sys.exit(inside.main())  # not this module's: transferred objects must be of the same module at both ends
