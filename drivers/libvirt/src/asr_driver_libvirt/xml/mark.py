"""What a mark holds, and the names of checkpoints. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

import attrs

from asrcore.model.point import Consistency, Mark

__all__ = ["CheckpointName", "LibvirtMark", "MarkedDisk", "is_ours", "view_key"]

_PREFIX = "asr-"
_LETTERS = {
    Consistency.CRASH: "c",
    Consistency.FILESYSTEM: "f",
    Consistency.APPLICATION: "a",
    Consistency.OFFLINE: "o",
}
_NAME = re.compile(
    r"asr-(?P<view>[A-Za-z0-9_-]{1,80})\.(?P<taken>[0-9a-f]{1,14})(?P<how>[cfao])(?:\.(?P<owner>[a-z0-9]{1,16}))?"
)
_PLAIN_VIEW = re.compile(r"[A-Za-z0-9_-]{1,80}")
_VERSION = 1


def is_ours(name: str, owner: str) -> bool:
    """Whether a checkpoint of that name is of the vault with the tag `owner`; all others belong to other vaults or
    applications and are left alone."""
    parsed = CheckpointName.parse(name)
    return parsed is not None and parsed.owner == owner


@attrs.frozen
class CheckpointName:
    """Name of a checkpoint, of its bitmaps, and the ending of its scratch files.

    It names the view, when that was taken (milliseconds) and how, so that a restarted engine finds all of that at the
    host, and two views of one id never share a name. `owner`: the tag of the vault, "" for a site that has none.
    """

    view: str
    taken_ms: int
    consistency: Consistency
    owner: str = ""

    @classmethod
    def make(cls, view_id: str, taken_at: float, consistency: Consistency, owner: str = "") -> CheckpointName:
        """The name for a view that is about to be taken."""
        return cls(view_key(view_id), int(taken_at * 1000), consistency, owner)

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """None for a name that is not this driver's, whichever vault's."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        how = next(kind for kind, letter in _LETTERS.items() if letter == match["how"])
        return cls(match["view"], int(match["taken"], 16), how, match["owner"] or "")

    @property
    def taken_at(self) -> float:
        """Seconds since the epoch."""
        return self.taken_ms / 1000

    def __str__(self) -> str:
        name = f"{_PREFIX}{self.view}.{self.taken_ms:x}{_LETTERS[self.consistency]}"
        return f"{name}.{self.owner}" if self.owner else name


def view_key(view_id: str) -> str:
    """The view's id as part of a name: itself where its letters allow that, else a digest."""
    if _PLAIN_VIEW.fullmatch(view_id):
        return view_id
    return "x" + hashlib.sha256(view_id.encode()).hexdigest()[:32]


@attrs.frozen
class MarkedDisk:
    """A disk at the mark. `tracked`: the checkpoint has a bitmap for it. `size` in bytes.

    `stamp` is, for a machine that was off, the state of its image: equal stamps mean that nothing was written.
    """

    path: str
    size: int
    tracked: bool
    stamp: str = ""


@attrs.frozen
class LibvirtMark:
    """Content of a mark's token. `checkpoint` "" where nothing is tracked (a machine that was off all the time).
    `shut_down`: the machine was off, having been shut down in order."""

    checkpoint: str
    disks: Mapping[str, MarkedDisk]
    shut_down: bool = False

    def token(self) -> Mark:
        """The opaque form; equal content gives the equal token."""
        disks = {disk_id: attrs.asdict(disk) for disk_id, disk in sorted(self.disks.items())}
        content = {"version": _VERSION, "checkpoint": self.checkpoint, "disks": disks, "off": self.shut_down}
        return Mark(json.dumps(content, separators=(",", ":"), sort_keys=True))

    @classmethod
    def parse(cls, mark: Mark) -> LibvirtMark | None:
        """None for a token that is not this driver's, or damaged: then nothing is certain."""
        try:
            content = json.loads(mark.token)
            if content["version"] != _VERSION:
                return None
            disks = {
                str(disk_id): MarkedDisk(
                    path=str(disk["path"]),
                    size=int(disk["size"]),
                    tracked=bool(disk["tracked"]),
                    stamp=str(disk["stamp"]),
                )
                for disk_id, disk in content["disks"].items()
            }
            checkpoint, shut_down = str(content["checkpoint"]), bool(content["off"])
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return cls(checkpoint, disks, shut_down) if not checkpoint or CheckpointName.parse(checkpoint) else None
