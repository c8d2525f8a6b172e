"""The bpf() and perf_event_open() system calls by ctypes, and the tracking program as bytes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import re
import resource
import struct
from contextlib import suppress
from pathlib import Path

from asr_mobility import btf

__all__ = [
    "Request",
    "TracePoint",
    "attach",
    "create_array",
    "get_pinned",
    "mount",
    "pin",
    "request",
    "trace_point",
    "tracking_program",
]

_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
_MAP_CREATE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET, _RAW_OPEN, _LINK_CREATE = 0, 5, 6, 7, 17, 28
_ARRAY, _MMAPABLE = 2, 1 << 10
_PROG_TRACEPOINT, _ATTACH_PERF_EVENT = 5, 41
_PROG_TRACING, _ATTACH_TYPED = 26, 23
_IOC_SET_BPF, _IOC_ENABLE = 0x40042408, 0x2400
_PERF_TRACEPOINT = 2
_CLOEXEC = 8
_LICENCE = b"Dual MIT/GPL"
"""Of the program that is loaded, not of this module: the kernel shows its own types to such a program only."""
PAGE = 4096
"""Bytes of an element of the array: one page, so that all of it can be mapped."""
TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

_libc = ctypes.CDLL(None, use_errno=True)


def _numbers() -> tuple[int, int]:
    try:
        return _SYSCALLS[platform.machine()]
    except KeyError:
        raise OSError(38, "no bpf() known for processor " + platform.machine()) from None


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, max(len(attributes), 120))
    result: int = _libc.syscall(_numbers()[0], command, buffer, len(buffer))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf({command}): {os.strerror(code)}")
    return result


def mount(kind: str, where: str) -> None:
    """Mount a kernel file system. Raises OSError."""
    if _libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {where}: {os.strerror(code)}")


def create_array(elements: int) -> int:
    """A descriptor of a new array of pages that can be mapped into memory."""
    with suppress(ValueError, OSError):  # kernels before 5.11 count it as locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    return _bpf(_MAP_CREATE, struct.pack("<IIIII", _ARRAY, 4, PAGE, elements, _MMAPABLE))


def pin(descriptor: int, path: str) -> None:
    """Give an object a name in bpffs: it outlives this process."""
    name = ctypes.create_string_buffer(path.encode())
    _bpf(_OBJ_PIN, struct.pack("<QI", ctypes.addressof(name), descriptor))


def get_pinned(path: str) -> int:
    """A descriptor of the object of that name. Raises FileNotFoundError."""
    name = ctypes.create_string_buffer(path.encode())
    return _bpf(_OBJ_GET, struct.pack("<QII", ctypes.addressof(name), 0, 0))


class TracePoint:
    """A trace point of this kernel: its id, and where its fields lie in a record."""

    def __init__(self, text: str) -> None:
        found = re.search(r"^ID: (\d+)", text, re.M)
        if found is None:
            raise ValueError("no format of a trace point")
        self.id = int(found[1])
        fields = re.findall(r"([A-Za-z_]\w*)(?:\[\d*\])?;\s+offset:(\d+);", text)
        self.offsets: dict[str, int] = {name: int(offset) for name, offset in fields}
        missing = {"dev", "sector", "nr_sector", "rwbs"} - set(self.offsets)
        if missing:
            raise ValueError("the trace point has no field " + ", ".join(sorted(missing)))


def trace_point(event: str) -> TracePoint:
    """Read a block event's format, mounting tracefs if it is not mounted. Raises OSError, ValueError."""
    if not any(Path(root, "events/block").is_dir() for root in TRACEFS):
        mount("tracefs", TRACEFS[0])
    for root in TRACEFS:
        path = Path(root, "events/block", event, "format")
        if path.is_file():
            return TracePoint(path.read_text())
    raise FileNotFoundError(2, "the kernel has no trace point block:" + event)


class Request:
    """The completion of a request as the kernel's own type: where its fields lie.

    A program that gets it is called by the trace point itself. One that gets the trace point's record is called by the
    perf subsystem, which leaves out events: those that interrupt another eBPF program on the same processor, and all of
    a task whose recursion count it takes for used up (seen on Linux 6.18: each event on an idle processor).
    """

    def __init__(self, types: btf.Types) -> None:
        """Raises KeyError if this kernel has none of them."""
        self.hook = types.typedefs["btf_trace_block_rq_complete"]
        fields, queue, disk = (types.structs[name] for name in ("request", "request_queue", "gendisk"))
        self.sector, self.flags = fields["__sector"], fields["cmd_flags"]
        self.to_disk = [fields["q"], queue["disk"]] if "disk" in queue else [fields["rq_disk"]]  # before Linux 5.16
        self.major, self.minor = disk["major"], disk["first_minor"]


_requests: list[Request | None] = []


def request() -> Request | None:
    """Of the running kernel; None if it does not describe its types."""
    if not _requests:
        names = {"request", "request_queue", "gendisk", "btf_trace_block_rq_complete"}
        try:
            _requests.append(Request(btf.Types(btf.KERNEL.read_bytes(), names)))
        except (OSError, ValueError, KeyError):
            _requests.append(None)
    return _requests[0]


def attach(program: bytes, point: TracePoint | Request) -> tuple[int, bool]:
    """Load and attach; gives a descriptor to hold on to, and whether it is a link that can be pinned (Linux 5.15; with
    a `Request` Linux 5.8)."""
    loaded = _load(program, point)
    try:
        if isinstance(point, Request):
            return _bpf(_RAW_OPEN, struct.pack("<QI", 0, loaded)), True
        event = _perf_event(point.id)
        try:
            link = _bpf(_LINK_CREATE, struct.pack("<IIIIQ", loaded, event, _ATTACH_PERF_EVENT, 0, 0))
        except OSError:
            fcntl.ioctl(event, _IOC_SET_BPF, loaded)
            fcntl.ioctl(event, _IOC_ENABLE, 0)
            return event, False
        os.close(event)
        return link, True
    finally:
        os.close(loaded)


def _load(program: bytes, point: TracePoint | Request) -> int:
    code, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(_LICENCE)
    log = ctypes.create_string_buffer(1 << 20)
    addresses = (ctypes.addressof(code), ctypes.addressof(licence))
    kind, typed = _PROG_TRACEPOINT, b""
    if isinstance(point, Request):
        # From its name (16 bytes) to the number of the type that it is attached to: union bpf_attr.
        kind, typed = _PROG_TRACING, struct.pack("<16xII36xI", 0, _ATTACH_TYPED, point.hook)

    def load(level: int) -> int:
        attributes = (kind, len(program) // 8, *addresses, level)
        where = (len(log), ctypes.addressof(log)) if level else (0, 0)
        return _bpf(_PROG_LOAD, struct.pack("<IIQQIIQII", *attributes, *where, 0, 0) + typed)

    try:
        return load(0)
    except OSError as problem:
        try:
            return load(1)  # again, to get the verifier's message
        except OSError:
            raise OSError(problem.errno, f"{problem.strerror} {log.value.decode()[-500:]}") from problem


def _perf_event(event_id: int) -> int:
    attributes = bytearray(128)
    struct.pack_into("<IIQQ", attributes, 0, _PERF_TRACEPOINT, len(attributes), event_id, 1)
    buffer = ctypes.create_string_buffer(bytes(attributes), len(attributes))
    # One processor is named and all are traced: the program belongs to the trace point, not to the event.
    event: int = _libc.syscall(_numbers()[1], buffer, -1, 0, -1, _CLOEXEC)
    if event < 0:
        code = ctypes.get_errno()
        raise OSError(code, "perf_event_open: " + os.strerror(code))
    return event


# -- the program ---------------------------------------------------------------------------------------------------

_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _R9, _FP = range(11)
# Codes of the instructions that are used: loads and stores by size, 64-bit arithmetic, jumps.
_LDW, _LDB, _LDDW, _STW, _STXW, _STB, _IMM64 = 0x61, 0x71, 0x79, 0x62, 0x63, 0x72, 0x18
_MOV, _MOVI, _ADD, _ADDI, _SUB, _RSHI, _ANDI, _XADD = 0xBF, 0xB7, 0x0F, 0x07, 0x1F, 0x77, 0x57, 0xDB
_JA, _JEQ, _JNE, _JGT, _JGTR, _JLT, _CALL, _EXIT = 0x05, 0x15, 0x55, 0x25, 0x2D, 0xA5, 0x85, 0x95
_MAP_LOOKUP = 1

FINE_MOST = 512
"""Granules that one request may touch one by one; a larger one (a discard) is noted in coarse granules."""
COARSE = 9
"""A coarse granule is 2 ** COARSE granules."""
EVENTS, SECTORS, ELSEWHERE, OVERFLOW = range(4)
"""Counters: requests, their sectors, commands with unknown location, requests too large to be noted."""


class _Assembler:
    def __init__(self) -> None:
        self._code: list[bytes] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def op(self, code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        value = value if value < 2**31 else value - 2**32
        self._code.append(struct.pack("<BBhi", code, to | source << 4, offset, value))

    def jump(self, code: int, label: str, to: int = 0, source: int = 0, value: int = 0) -> None:
        self._jumps.append((len(self._code), label))
        self.op(code, to, source, 0, value)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def bytes(self) -> bytes:
        for at, label in self._jumps:
            patched = bytearray(self._code[at])
            struct.pack_into("<h", patched, 2, self._labels[label] - at - 1)
            self._code[at] = bytes(patched)
        return b"".join(self._code)


def tracking_program(  # noqa: PLR0915 - one program, line by line
    array: int, device: int, shift: int, places: tuple[int, int, int], point: TracePoint | Request
) -> bytes:
    """Sets a byte of the array for each granule (2 ** shift bytes) that a completed write, discard or zeroing touched.

    `device`: the kernel's number of the disk (20 bits of minor number). `places`: elements where fine bytes, coarse
    bytes and counters begin. Completion and not issue: a granule read between issue and completion would be read too
    early.
    """
    fine, coarse, counters = places
    program = _Assembler()
    op, jump, label = program.op, program.jump, program.label

    def lookup() -> None:  # r0 = address of the element whose number is at fp-4
        op(_MOV, _R2, _FP)
        op(_ADDI, _R2, value=-4)
        op(_IMM64, _R1, 1, value=array)
        op(0)
        op(_CALL, value=_MAP_LOOKUP)
        jump(_JEQ, "exit", _R0, value=0)

    def count(slot: int, register: int) -> None:
        op(_XADD, _R0, register, slot * 8)

    if isinstance(point, Request):  # its arguments: the request, its error, the bytes that are complete
        op(_LDDW, _R6, _R1, 0)
        op(_LDW, _R8, _R1, 16)
        op(_MOV, _R7, _R6)
        for offset in point.to_disk:
            op(_LDDW, _R7, _R7, offset)
        op(_LDW, _R3, _R7, point.major)
        jump(_JNE, "exit", _R3, value=device >> 20)
        op(_LDW, _R3, _R7, point.minor)
        jump(_JNE, "exit", _R3, value=device & 0xFFFFF)
        op(_LDW, _R3, _R6, point.flags)
        op(_ANDI, _R3, value=1)
        jump(_JEQ, "exit", _R3, value=0)  # operations that send data to the disk have odd numbers
        op(_RSHI, _R8, value=9)
        op(_LDDW, _R6, _R6, point.sector)
    else:
        op(_LDW, _R7, _R1, point.offsets["dev"])
        jump(_JNE, "exit", _R7, value=device)
        op(_LDB, _R3, _R1, point.offsets["rwbs"])
        jump(_JEQ, "exit", _R3, value=ord("R"))
        op(_LDW, _R8, _R1, point.offsets["nr_sector"])
        op(_LDDW, _R6, _R1, point.offsets["sector"])
    jump(_JEQ, "exit", _R8, value=0)  # a flush without data
    op(_STW, _FP, 0, -4, counters)
    lookup()
    op(_MOVI, _R4, value=1)
    count(EVENTS, _R4)
    jump(_JNE, "placed", _R6, value=-1)
    op(_MOVI, _R4, value=1)
    count(ELSEWHERE, _R4)  # SG_IO, such as smartd's: commands that write no data, or whose location is unknown
    jump(_JA, "exit")
    label("placed")
    count(SECTORS, _R8)
    op(_MOV, _R7, _R6)
    op(_ADD, _R7, _R8)
    op(_ADDI, _R7, value=-1)
    op(_RSHI, _R6, value=shift - 9)  # first granule
    op(_RSHI, _R7, value=shift - 9)  # last granule
    op(_MOV, _R5, _R7)
    op(_SUB, _R5, _R6)
    jump(_JGT, "coarse", _R5, value=FINE_MOST - 1)
    for kind, first in (("fine", fine), ("coarse", coarse)):
        if kind == "coarse":
            label("coarse")
            op(_RSHI, _R6, value=COARSE)
            op(_RSHI, _R7, value=COARSE)
            op(_MOV, _R5, _R7)
            op(_SUB, _R5, _R6)
            jump(_JGT, "overflow", _R5, value=FINE_MOST - 1)
        op(_MOVI, _R9, value=0)
        label(kind + "-next")
        op(_MOV, _R3, _R6)
        op(_RSHI, _R3, value=12)
        op(_ADDI, _R3, value=first)
        op(_STXW, _FP, _R3, -4)
        lookup()
        op(_MOV, _R3, _R6)
        op(_ANDI, _R3, value=PAGE - 1)
        op(_ADD, _R0, _R3)
        op(_STB, _R0, 0, 0, 1)
        op(_ADDI, _R6, value=1)
        op(_ADDI, _R9, value=1)
        jump(_JGTR, "exit", _R6, _R7)
        jump(_JLT, kind + "-next", _R9, value=FINE_MOST)
        jump(_JA, "exit")
    label("overflow")
    op(_STW, _FP, 0, -4, counters)
    lookup()
    op(_MOVI, _R4, value=1)
    count(OVERFLOW, _R4)
    label("exit")
    op(_MOVI, _R0, value=0)
    op(_EXIT)
    return program.bytes()
