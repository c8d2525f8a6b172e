"""The management endpoint, the sign-in endpoint and the disks' endpoint of a cloud in a directory.

Only the calls that the driver makes exist. Everything else, and everything that Azure would refuse (an unknown property
or value, a disk in the wrong state, a network in use, too many snapshots), is refused. Answers are like Azure's:
changes are accepted immediately and done when the operation reports it.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import attrs

from drivers.azure.tests.peers.arm import certificate
from drivers.azure.tests.peers.arm.compute import SIZES, Compute
from drivers.azure.tests.peers.arm.content import Content
from drivers.azure.tests.peers.arm.hypervisor import Paper, Qemu
from drivers.azure.tests.peers.arm.network import KINDS, Network
from drivers.azure.tests.peers.arm.schema import Refusal, check

SUBSCRIPTION = "11111111-2222-3333-4444-555555555555"
TENANT = "66666666-7777-8888-9999-000000000000"
GROUP = "recovery"
LOCATION = "westeurope"
COMPUTE = ("disks", "snapshots", "virtualMachines")
_RESOURCE = re.compile(
    rf"/subscriptions/{SUBSCRIPTION}/resourceGroups/([\w.-]+)/providers/Microsoft\.(Compute|Network)/(\w+)"
    r"(?:/([\w.-]+)(?:/(\w+))?)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,78}[A-Za-z0-9_])?")
_VERSION = re.compile(r"20\d\d-\d\d-\d\d")

_Answer = tuple[int, dict[str, str], bytes]


@attrs.define
class Operation:
    """In progress until `done` returns True. `answer`: the final answer of its location."""

    done: Callable[[], bool]
    answer: dict[str, Any] | None = None
    polls: int = 0


class Cloud:
    """A subscription with one resource group, in `directory`. `boots`: whether machines are real guests."""

    def __init__(self, directory: Path, *, boots: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.boots = boots
        self.secret = secrets.token_urlsafe(16)
        self.client_id = str(uuid.uuid4())
        self.token_seconds = 3600
        self.cut = False
        """Whether requests get no answer."""
        self.polls = 1
        """How often an operation is polled before it is done."""
        self.deny = ""
        """Requests whose method and path this expression matches are forbidden to the caller."""
        self.content = Content(directory / "disks")
        self.compute = Compute(self)
        self.network = Network(self)
        self.deallocated: set[str] = set()
        self.pressed: set[str] = set()
        self.traffic: list[dict[str, Any]] = []
        self.tokens_given = 0
        self._tokens: dict[str, float] = {}
        self._items: dict[tuple[str, str], dict[str, Any]] = {}
        self._machines: dict[str, Paper] = {}
        self._operations: dict[str, Operation] = {}
        self._lock = threading.RLock()
        pem, self.ca_file = certificate.make(directory)
        cloud = self

        class Handler(_Handler):
            owner = cloud

        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self._server.context = context
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="cloud", daemon=True).start()
        self._furnish()

    def _furnish(self) -> None:
        """The user's own resources: a network with two subnets, and a security group."""
        self._make("networkSecurityGroups", "lab-nsg", {"location": LOCATION, "properties": {}})
        subnets = [
            {"name": name, "properties": {"addressPrefix": f"10.9.{index}.0/24"}}
            for index, name in enumerate(("lab", "dmz"))
        ]
        body = {
            "location": LOCATION,
            "properties": {"addressSpace": {"addressPrefixes": ["10.9.0.0/16"]}, "subnets": subnets},
        }
        self._make("virtualNetworks", "production", body)

    def settings(self) -> dict[str, str]:
        """Settings for a site of the driver."""
        return {
            "subscription": SUBSCRIPTION,
            "resource_group": GROUP,
            "location": LOCATION,
            "tenant": TENANT,
            "client_id": self.client_id,
            "client_secret": self.secret,
            "management_url": self.url,
            "authority": self.url,
            "ca_file": str(self.ca_file),
            "networks": "lab=production/lab;dmz=production/dmz+public+nsg:lab-nsg",
        }

    # -- state

    def id(self, kind: str, name: str) -> str:
        """A resource's id."""
        provider = "Microsoft.Compute" if kind in COMPUTE else "Microsoft.Network"
        return f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/{provider}/{kind}/{name}"

    def all(self, kind: str) -> list[dict[str, Any]]:
        """All resources of a kind."""
        with self._lock:
            return [item for (found, _), item in sorted(self._items.items()) if found == kind]

    def names(self) -> list[str]:
        """All resources except the user's own."""
        with self._lock:
            keys = sorted(self._items)
        return [f"{kind}/{name}" for kind, name in keys if name not in ("production", "lab-nsg")]

    def item(self, kind: str, name: str) -> dict[str, Any]:
        """Return a resource. Raises Refusal for a missing one."""
        found = self._items.get((kind, name.lower()))
        if found is None:
            raise Refusal(404, "ResourceNotFound", f"the resource {kind}/{name} was not found")
        return found

    def by_id(self, resource_id: str, kind: str) -> dict[str, Any]:
        """Raises Refusal for one that is missing or of another kind."""
        match = _RESOURCE.fullmatch(resource_id)
        if match is None or match[3] != kind or match[1].lower() != GROUP:
            raise Refusal(400, "LinkedInvalidPropertyId", f"{resource_id} is no id of {kind} in this group")
        return self.item(kind, match[4])

    def hypervisor(self, name: str) -> Paper:
        """The hypervisor of a machine."""
        if name not in self._machines:
            self._machines[name] = Qemu(name, self.directory / "machines") if self.boots else Paper(name)
        return self._machines[name]

    def hypervisor_of(self, machine_id: str) -> Paper:
        """The same by the machine's id."""
        return self.hypervisor(self.by_id(machine_id, "virtualMachines")["name"])

    def tagged(self, body: dict[str, Any]) -> None:
        """Raises Refusal for tags that Azure would refuse."""
        if body.get("location", "").lower() != LOCATION:
            raise Refusal(400, "LocationNotAvailableForResourceGroup", f"location {body.get('location')!r}")
        tags = body.get("tags") or {}
        if len(tags) > 50 or any(len(name) > 512 or len(value) > 256 for name, value in tags.items()):
            raise Refusal(400, "InvalidTag", "at most 50 tags, 512 characters of name, 256 of value")
        if any(set(name) & set("<>%&\\?/") for name in tags):
            raise Refusal(400, "InvalidTagNameCharacters", ", ".join(tags))

    def _make(self, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        if not _NAME.fullmatch(name) or (kind == "virtualMachines" and len(name) > 64):
            raise Refusal(400, "InvalidResourceName", name)
        former = self._items.get((kind, name.lower()))
        if kind == "disks":
            made = self.compute.put_disk(name, body, former)
        elif kind == "snapshots":
            made = self.compute.put_snapshot(name, body, former)
        elif kind == "virtualMachines":
            # The machine must exist while it is made: its disks refer to it.
            self._items[kind, name.lower()] = body | {"name": name}
            try:
                made = self.compute.put_machine(name, body, former)
            except Exception:
                del self._items[kind, name.lower()]
                if former is not None:
                    self._items[kind, name.lower()] = former
                raise
        else:
            made = self.network.put(kind, name, body, former)
        provider = "Microsoft.Compute" if kind in COMPUTE else "Microsoft.Network"
        made |= {"id": self.id(kind, name), "name": name, "type": f"{provider}/{kind}"}
        made["properties"]["provisioningState"] = "Succeeded"
        self._items[kind, name.lower()] = made
        return made

    # -- requests

    def serve(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> _Answer:
        """Answer one request. Raises Refusal."""
        if path.startswith("/md-content/"):
            return self.content.serve(method, query, headers, body)
        if path.startswith(f"/{TENANT}"):
            return self._sign_in(method, path, body)
        self._allowed(headers)
        if self.deny and re.search(self.deny, f"{method} {path}"):
            raise Refusal(403, "AuthorizationFailed", "the client has no authorization to perform this action")
        if path.startswith("/operations/"):
            return self._operation(path.removeprefix("/operations/"))
        if not _VERSION.fullmatch(query.get("api-version", "")):
            raise Refusal(400, "MissingApiVersionParameter", "api-version")
        document = json.loads(body) if body else None
        with self._lock:
            return self._manage(method, path, query, document)

    def _allowed(self, headers: Any) -> None:
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if self._tokens.get(token, 0) < time.time():
            raise Refusal(401, "ExpiredAuthenticationToken", "the access token is unknown or expired")

    def _sign_in(self, method: str, path: str, body: bytes) -> _Answer:
        base = f"{self.url}/{TENANT}"
        if method == "GET" and path.endswith("/v2.0/.well-known/openid-configuration"):
            found = {
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "issuer": f"{base}/v2.0",
            }
            return _json(200, found)
        form = dict(parse_qsl(body.decode()))
        if method != "POST" or not path.endswith("/oauth2/v2.0/token"):
            raise Refusal(404, "NotFound", path)
        if form.get("client_id") != self.client_id or form.get("client_secret") != self.secret:
            return _json(401, {"error": "invalid_client", "error_description": "AADSTS7000215: wrong secret"})
        token = secrets.token_urlsafe(24)
        self._tokens[token] = time.time() + self.token_seconds
        self.tokens_given += 1
        return _json(200, {"token_type": "Bearer", "expires_in": self.token_seconds, "access_token": token})

    def _operation(self, name: str) -> _Answer:
        name, _, final = name.partition("/")
        operation = self._operations.get(name)
        if operation is None:
            raise Refusal(404, "NotFound", f"operation {name}")
        operation.polls += 1
        with self._lock:
            done = operation.polls > self.polls and operation.done()
        if not done:
            status = {"name": name, "status": "InProgress"}
            return _json(202 if final else 200, status, {"retry-after-ms": "20", **self._where(name)})
        if final:
            return _json(200, operation.answer) if operation.answer is not None else (204, {}, b"")
        return _json(200, {"name": name, "status": "Succeeded"})

    def _where(self, name: str) -> dict[str, str]:
        query = "?api-version=2026-04-01"
        return {
            "Azure-AsyncOperation": f"{self.url}/operations/{name}{query}",
            "Location": f"{self.url}/operations/{name}/result{query}",
        }

    def _accepted(
        self,
        done: Callable[[], bool] = lambda: True,
        answer: dict[str, Any] | None = None,
        *,
        status: int = 202,
        body: dict[str, Any] | None = None,
    ) -> _Answer:
        name = str(uuid.uuid4())
        self._operations[name] = Operation(done, answer)
        return _json(status, body, {"retry-after-ms": "20", **self._where(name)})

    def _manage(self, method: str, path: str, query: dict[str, str], body: Any) -> _Answer:
        skus = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute/skus"
        if path == skus and method == "GET":
            return _json(200, {"value": [_sku(name) for name in SIZES]})
        match = _RESOURCE.fullmatch(path)
        if match is None or match[1].lower() != GROUP:
            raise Refusal(404, "ResourceGroupNotFound", path)
        kind, name, action = match[3], match[4], match[5]
        if kind not in (*COMPUTE, *KINDS):
            raise Refusal(404, "InvalidResourceType", kind)
        if name is None:
            if method != "GET":
                raise Refusal(405, "MethodNotAllowed", path)
            return _json(200, {"value": self.all(kind)})
        if action is not None:
            return self._act(method, kind, name, action, query, body)
        if method == "GET":
            return _json(200, self.item(kind, name))
        if method == "PUT":
            return self._put(kind, name, body)
        if method == "PATCH" and kind in ("virtualMachines", "disks", "snapshots"):
            return self._patch(kind, name, body)
        if method == "DELETE":
            return self._delete(kind, name)
        raise Refusal(405, "MethodNotAllowed", f"{method} {kind}")

    def _put(self, kind: str, name: str, body: Any) -> _Answer:
        new = (kind, name.lower()) not in self._items
        made = self._make(kind, name, body)
        shown = made | {"properties": made["properties"] | {"provisioningState": "Updating"}}
        if kind in ("disks", "snapshots"):
            return self._accepted(status=202, body=shown)
        return self._accepted(status=201 if new else 200, body=shown)

    def _patch(self, kind: str, name: str, body: Any) -> _Answer:
        updates = {"virtualMachines": "VirtualMachineUpdate", "disks": "DiskUpdate", "snapshots": "SnapshotUpdate"}
        check("compute", updates[kind], body)
        if set(body) != {"tags"}:
            raise Refusal(400, "PropertyChangeNotAllowed", "this server changes only tags")
        item = self.item(kind, name)
        self.tagged({"location": LOCATION, **body})
        item["tags"] = body["tags"]
        return self._accepted(status=200 if kind == "virtualMachines" else 202, body=item)

    def _delete(self, kind: str, name: str) -> _Answer:
        item = self._items.get((kind, name.lower()))
        if item is None:
            return 204, {}, b""
        if kind in ("disks", "snapshots"):
            self.compute.delete_disk(kind, name, item)
        elif kind == "virtualMachines":
            self.compute.delete_machine(name, item)
        else:
            self.network.delete(kind, name, item)
        del self._items[kind, name.lower()]
        return self._accepted()

    def _act(self, method: str, kind: str, name: str, action: str, query: dict[str, str], body: Any) -> _Answer:
        item = self.item(kind, name)
        if kind in ("disks", "snapshots") and method == "POST":
            if action == "beginGetAccess":
                return self._accepted(answer=self.compute.grant(kind, name, item, body))
            if action == "endGetAccess":
                self.compute.revoke(kind, name, item)
                return self._accepted()
        if kind == "virtualMachines" and method == "POST":
            if action == "start":
                self.compute.power_on(name, item)
                return self._accepted()
            if action == "powerOff":
                skip = query.get("skipShutdown", "false") == "true"
                self.compute.power_off(name, skip_shutdown=skip)
                return self._accepted(lambda: self.compute.power_off(name, skip_shutdown=skip))
            if action == "deallocate":
                self.compute.deallocate(name, item)
                return self._accepted()
        if kind == "virtualMachines" and method == "GET" and action == "instanceView":
            power = self.compute.power_state(name)
            statuses = [
                {"code": "ProvisioningState/succeeded", "level": "Info"},
                {"code": f"PowerState/{power}", "level": "Info", "displayStatus": f"VM {power}"},
            ]
            return _json(200, {"statuses": statuses})
        raise Refusal(404, "NotFound", f"{method} {kind}/{action}")

    def record(self, method: str, path: str, sent: bytes, status: int, given: bytes, headers: dict[str, str]) -> None:
        """Record the management traffic for later checks."""
        if path.startswith("/subscriptions/"):
            self.traffic.append(
                {
                    "method": method,
                    "path": path,
                    "sent": json.loads(sent) if sent else None,
                    "status": status,
                    "given": json.loads(given) if given else None,
                    "headers": headers,
                }
            )

    def close(self) -> None:
        """Stop all machines and stop listening."""
        for machine in self._machines.values():
            machine.kill()
        self._server.shutdown()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _json(status: int, document: Any, headers: dict[str, str] | None = None) -> _Answer:
    content = b"" if document is None else json.dumps(document).encode()
    return status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, content


def _sku(name: str) -> dict[str, Any]:
    cpus, memory, disks, generations, cards, processors, controllers = SIZES[name]
    able: dict[str, object] = {
        "vCPUs": cpus,
        "MemoryGB": memory,
        "MaxDataDiskCount": disks,
        "HyperVGenerations": generations,
        "MaxNetworkInterfaces": cards,
        "CpuArchitectureType": processors,
    }
    if controllers:
        able["DiskControllerTypes"] = controllers
    return {
        "resourceType": "virtualMachines",
        "name": name,
        "family": "lab",
        "locations": [LOCATION],
        "capabilities": [{"name": key, "value": str(value)} for key, value in able.items()],
        "restrictions": [],
    }


class _Server(ThreadingHTTPServer):
    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a slow handshake does not delay others."""
        try:
            request = self.context.wrap_socket(request, server_side=True)
        except (ssl.SSLError, OSError):
            request.close()
            return
        try:
            with contextlib.suppress(OSError):  # the client was killed
                super().finish_request(request, client_address)
        finally:
            with contextlib.suppress(OSError):
                request.close()


class _Handler(BaseHTTPRequestHandler):
    owner: Cloud
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def setup(self) -> None:
        """A connection was opened."""
        super().setup()
        self.owner._connections.add(self.connection)

    def finish(self) -> None:
        """A connection was closed."""
        self.owner._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.owner.cut:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            status, headers, content = self.owner.serve(self.command, url.path, query, self.headers, body)
        except Refusal as refusal:
            status = refusal.status
            error = {"error": {"code": refusal.code, "message": refusal.message}}
            headers = {"Content-Type": "application/json", "x-ms-error-code": refusal.code}
            if refusal.after is not None:
                headers["Retry-After"] = f"{refusal.after:g}"
            content = b"" if self.command == "HEAD" else json.dumps(error).encode()
        self.owner.record(self.command, self.path, body, status, content, headers)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = _serve  # noqa: N815 - the base class wants these names

    def log_message(self, *_: object) -> None:
        """Print nothing: traffic is recorded."""
