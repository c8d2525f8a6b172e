"""The configuration server's API: access to the vault for components and people, as JSON over HTTPS.

The caller is known by the certificate of the connection (`web`), and each path names the roles that may use it.
Errors are those of the catalogue: the body holds `AsrError.as_dict` with the attributes, as a job's record does.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asrcore import codec
from asrcore.config_server.metrics import exposition
from asrcore.config_server.web import peer_of
from asrcore.errors import AsrError, Category, CertificateRole, InvalidValue, NotFound, RequestRefused
from asrcore.jobs import enqueue
from asrcore.model.plain import plain
from asrcore.model.state import Event, allowed
from asrcore.pki.authority import Authority
from asrcore.pki.request import Issued
from asrcore.procedures.procedure import Arguments
from asrcore.service import status
from asrcore.units import DAY
from asrcore.vault import Job, Vault
from asrcore.wire.tls import Component, Role

__all__ = ["VERBS", "make_app"]

_STATUS = {
    Category.USAGE: 400,
    Category.NOT_FOUND: 404,
    Category.CONFLICT: 409,
    Category.REFUSED: 422,
    Category.ACCESS: 403,
    Category.CAPACITY: 507,
    Category.UNREACHABLE: 503,
    Category.VAULT: 503,
}
_LARGEST = 64 * 1024  # bytes of a request
_LIMIT = 10_000  # entries of a list
_LONGEST = int(DAY)  # seconds that a shutdown may be waited for
_Body = dict[str, str | int | float | bool | None]

VERBS: Mapping[str, Event | None] = {
    "replicate": Event.REPLICATE,
    "resync": Event.START_RESYNC,
    "verify": Event.VERIFY,
    "failover-test": Event.TEST,
    "failover-cleanup": None,
    "failover-planned": Event.FAIL_OVER,
    "failover-unplanned": Event.FAIL_OVER,
    "failover-undo": Event.UNDO,
    "failover-commit": Event.COMMIT,
    "reprotect": Event.REPROTECT,
    "unprotect": Event.DISABLE,
    "adopt": None,
}
"""Kinds of jobs that may be ordered, and the event that must be possible."""

_COMPONENTS = frozenset(Role) - {Role.JOIN}
_LOOKERS = frozenset({Role.OPERATOR, Role.CONFIG_SERVER})
_OPERATORS = frozenset({Role.OPERATOR})


@attrs.frozen
class _Call:
    """`serial`: of the caller's certificate, hexadecimal."""

    caller: Component
    serial: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: _Body


class _Api:
    def __init__(self, vault: Vault, authority: Authority, clock: Callable[[], float]) -> None:
        self._vault = vault
        self._authority = authority
        self._clock = clock

    def routes(self) -> list[Route]:
        components, lookers, operators = _COMPONENTS, _LOOKERS, _OPERATORS
        return [
            self._route("POST", "/v1/join", frozenset({Role.JOIN}), self.join),
            self._route("POST", "/v1/renew", components, self.renew),
            self._route("GET", "/v1/revoked", components, self.revoked),
            self._route("GET", "/v1/health", components, self.health),
            self._route("GET", "/metrics", lookers, self.metrics),
            self._route("GET", "/v1/machines", lookers, self.machines),
            self._route("GET", "/v1/machines/{machine}/points", lookers, self.points),
            self._route("POST", "/v1/machines/{machine}/jobs", operators, self.order),
            self._route("GET", "/v1/jobs", lookers, self.jobs),
            self._route("GET", "/v1/jobs/{job}", lookers, self.job),
            self._route("POST", "/v1/jobs/{job}/cancel", operators, self.cancel),
            self._route("GET", "/v1/events", lookers, self.events),
            self._route("GET", "/v1/servers", lookers, self.servers),
        ]

    def _route(self, method: str, path: str, roles: frozenset[Role], work: Callable[[_Call], object]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                caller, serial = peer_of(request.scope)
                if caller.role not in roles:
                    wanted = " or ".join(sorted(role.value for role in roles))
                    raise CertificateRole(peer=str(caller), whose="its", found=str(caller), wanted=wanted)
                body = await _body(request)
                for name, value in (*request.path_params.items(), *request.query_params.items()):
                    _checked(name, value)
                call = _Call(caller, serial, request.path_params, request.query_params, body)
                answer = await run_in_threadpool(self._work, call, work)
            except AsrError as error:
                return _refused(error)
            return answer if isinstance(answer, Response) else JSONResponse(plain(answer))

        return Route(path, endpoint, methods=[method])

    def _work(self, call: _Call, work: Callable[[_Call], object]) -> object:
        self._authority.valid(call.serial)  # revoked ones are refused at once, not when a list is read
        return work(call)

    # -- components --------------------------------------------------------------------------------------------------

    def join(self, call: _Call) -> Issued:
        return self._authority.join(call.serial, _text(call.body, "request"))

    def renew(self, call: _Call) -> Issued:
        return self._authority.renew(call.serial, _text(call.body, "request"))

    def revoked(self, call: _Call) -> object:
        return {"revoked": self._authority.revoked()}

    def health(self, call: _Call) -> object:
        """Whether the vault answers, and whether an engine works on it."""
        return {"vault": "ok", "engine": self._vault.engine_holder(), "servers": self.servers(call)}

    # -- reading -----------------------------------------------------------------------------------------------------

    def metrics(self, call: _Call) -> Response:
        return Response(exposition(self._vault, self._clock()), media_type="text/plain; version=0.0.4")

    def machines(self, call: _Call) -> object:
        return [status.document(item) for item in status.machines(self._vault, self._clock())]

    def points(self, call: _Call) -> object:
        return self._vault.points(self._vault.protection(call.path["machine"]).id)

    def jobs(self, call: _Call) -> object:
        return self._vault.jobs(_limit(call), machine=call.query.get("machine"))

    def job(self, call: _Call) -> Job:
        return self._vault.job(call.path["job"])

    def events(self, call: _Call) -> object:
        return self._vault.events(machine=call.query.get("machine"), limit=_limit(call))

    def servers(self, call: _Call) -> object:
        assigned = list(self._vault.assigned().values())
        return [
            {
                "server": item.name,
                "host": item.host,
                "up": item.alive,
                "version": item.version,
                "silent_seconds": item.silent,
                "sites": None if item.sites is None else sorted(item.sites),
                "machines": assigned.count(item.session),
            }
            for item in self._vault.servers()
        ]

    # -- ordering ----------------------------------------------------------------------------------------------------

    def order(self, call: _Call) -> Job:
        """A verb as a job; the engine or process server that works on the vault runs it."""
        kind = _text(call.body, "verb")
        if kind not in VERBS:
            raise InvalidValue(what="verb", value=kind, wanted=", ".join(VERBS))
        given = {name: value for name, value in call.body.items() if name != "verb"}
        arguments = _arguments(given)
        protection = self._vault.protection(call.path["machine"])
        event = VERBS[kind]
        if event is not None:
            allowed(protection.name, protection.state, event)
        now = self._clock()
        job = enqueue(self._vault, kind, protection, arguments, now=now, who=str(call.caller))
        text = f"{call.caller} requested {kind} (job {job.id})"
        self._vault.add_event(at=now, machine=protection.name, kind="order", text=text)
        return job

    def cancel(self, call: _Call) -> object:
        return {"asked": self._vault.request_cancel(self._vault.job(call.path["job"]).id)}


async def _body(request: Request) -> _Body:
    if request.method != "POST":
        return {}
    too_large = RequestRefused(reason=f"it is larger than {_LARGEST} bytes")
    announced = request.headers.get("content-length", "0")
    if len(announced) > len(str(_LARGEST)) or (announced.isdecimal() and int(announced) > _LARGEST):
        raise too_large  # before it is waited for
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _LARGEST:
            raise too_large
    try:
        value = codec.load(_Body, data or b"{}")
    except ValueError as problem:
        wanted = "a JSON object of texts, numbers, true and false"
        raise InvalidValue(what="body", value="(not shown)", wanted=wanted) from problem
    for name, item in value.items():
        _checked("body", name)
        if isinstance(item, str):
            _checked(name, item)
    return value


def _checked(name: str, text: str) -> None:
    """Raises InvalidValue for what no database stores as a text."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise InvalidValue(what=ascii(name), value=ascii(text), wanted="text without NUL and lone surrogates")


def _text(body: _Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise InvalidValue(what=name, value=value, wanted="text")
    return value


def _arguments(given: _Body) -> Arguments:
    known = [field.name for field in attrs.fields(Arguments)]
    for name, value in given.items():
        if name not in known:
            raise InvalidValue(what=f"argument {name!a}", value=value, wanted=f"one of {', '.join(known)}")
    try:
        result = codec.convert(Arguments, given)
    except ValueError as problem:
        raise InvalidValue(what="arguments", value="what was sent", wanted=str(problem)) from problem
    if not 0 <= result.timeout <= _LONGEST:
        raise InvalidValue(what="argument timeout", value=result.timeout, wanted=f"0 to {_LONGEST} seconds")
    return result


def _limit(call: _Call) -> int:
    text = call.query.get("limit", "100")
    if not text.isdecimal() or len(text) > len(str(_LIMIT)) or not 1 <= int(text) <= _LIMIT:
        raise InvalidValue(what="limit", value=text, wanted=f"1 to {_LIMIT}")
    return int(text)


def _refused(error: AsrError) -> JSONResponse:
    attributes = {name: _simple(error.attributes[name]) for name in sorted(error.fields())}
    document = {"error": error.as_dict() | {"attributes": attributes}}
    return JSONResponse(document, status_code=_STATUS.get(error.category, 500))


def _simple(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else str(value)


async def _no_such_path(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    error = NotFound(kind="path", name=f"{request.method} {request.url.path}", listing="asr config-server --help")
    response = _refused(error)
    response.status_code = problem.status_code
    return response


def make_app(vault: Vault, authority: Authority, clock: Callable[[], float] = time.time) -> Starlette:
    """The ASGI application; `web` runs it."""
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {HTTPException: _no_such_path}
    return Starlette(routes=list(_Api(vault, authority, clock).routes()), exception_handlers=handlers)
