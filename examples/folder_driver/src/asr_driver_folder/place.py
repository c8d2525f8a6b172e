"""Where a site's machines are, and what the driver keeps beside them in `.asr`."""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import attrs

from asr_driver_folder import files
from asrcore.errors import MachineNotFound, SiteUnreachable

__all__ = ["Place"]


@attrs.frozen
class Place:
    """The folder of a site. `name` is the site's, for messages."""

    name: str
    path: Path

    def check(self) -> None:
        """Raises SiteUnreachable, as when the file system is not mounted."""
        if not self.path.is_dir():
            raise SiteUnreachable(site=self.name, detail=f"there is no folder {self.path}")

    def machine(self, machine_id: str) -> Path:
        """A machine's folder. Raises MachineNotFound."""
        self.check()
        folder = self.path / machine_id
        if machine_id != folder.name or machine_id.startswith(".") or not folder.is_dir():
            raise MachineNotFound(site=self.name, machine=machine_id)
        return folder

    def ours(self, *names: str) -> Path:
        """A path of the driver's own."""
        self.check()
        return self.path.joinpath(".asr", *names)

    def writing(self, where: Path) -> AbstractContextManager[None]:
        """Within it an OSError becomes an error of the catalogue."""
        return files.storage_errors(self.name, where)

    def move(self, folder: Path, place: Path) -> None:
        """Put a folder in its place at once and durably: a crash never leaves half of a machine there."""
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        files.sync(place.parent)

    def remove(self, folder: Path) -> None:
        """Delete a folder; it leaves its place at once as well."""
        with self.writing(folder):
            if folder.exists():
                trash = self.ours("trash", f"{folder.name}.{time.time_ns()}")
                self.move(folder, trash)
                shutil.rmtree(trash, ignore_errors=True)
