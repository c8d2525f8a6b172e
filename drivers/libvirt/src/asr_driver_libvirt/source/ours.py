"""Which of this driver's checkpoints, backup jobs and scratch files at a machine are this vault's.

Their names end with the vault's tag. What has no tag was left by a site that had none: by this vault, before its site
got one, or by another vault. It is this vault's only where that is certain: a mark that the vault records names it, or
it belongs to a view that this vault asks for; or it is a checkpoint that is linked with one of this vault's, which was
opened from it or from which it was opened (see `backup_jobs.our_checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterable

from asr_driver_libvirt.xml.mark import CheckpointName, LibvirtMark, is_ours, view_key
from asrcore.model.point import Mark

__all__ = ["Ours"]

# A view that was opened before the site got its tag is asked for again at the first cycle after that.
_VIEWS = 8


class Ours:
    """For one machine. Called, it decides by a name alone."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._named: set[str] = set()
        self._views: tuple[str, ...] = ()

    def learn(self, marks: Iterable[Mark | None], view_id: str | None = None) -> None:
        """From marks of the vault's record, and from a view that it asks for."""
        for mark in marks:
            parsed = None if mark is None else LibvirtMark.parse(mark)
            if parsed is not None and not self.tagged(parsed.checkpoint):
                self._named.add(parsed.checkpoint)
        if view_id is not None and view_key(view_id) not in self._views:
            self._views = (*self._views, view_key(view_id))[-_VIEWS:]

    def tagged(self, checkpoint: str) -> bool:
        """Whether the name of a mark's checkpoint has the vault's tag; so has a mark without one ("")."""
        return not checkpoint or is_ours(checkpoint, self.owner)

    def __call__(self, name: str) -> bool:
        parsed = CheckpointName.parse(name)
        if parsed is None:
            return False
        return parsed.owner == self.owner or name in self._named or (not parsed.owner and parsed.view in self._views)
