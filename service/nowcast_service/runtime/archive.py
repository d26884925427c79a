"""Trainings kept in a file, so that a service that restarts still shows them. Off unless a file is named.

One row a training: its id, when it was last heard of, and all that is known of it as compressed JSON. The file holds as
many as the board does; older ones make room. Losses of a training that runs are written every so often, not at once.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from nowcast_proto.errors import UnreadableFile
from nowcast_proto.trainings import Training
from pydantic import ValidationError

_VERSION = 1


class Archive:
    """The file. Its methods block: call them from a thread.

    Args:
        path: The file; made if it does not exist.
        most: Trainings kept at most.

    Raises:
        UnreadableFile: It cannot be opened, or is something else.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._lock = threading.Lock()
        try:
            with closing(self._connect()) as file, file:
                version = file.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, _VERSION):
                    raise UnreadableFile(f"{path} is an archive of version {version}", expected=f"version {_VERSION}")
                file.execute("PRAGMA journal_mode=WAL")
                file.execute(
                    "CREATE TABLE IF NOT EXISTS training "
                    "(tenant TEXT, id TEXT, heard REAL, whole BLOB, PRIMARY KEY (tenant, id))"
                )
                file.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as exc:
            raise UnreadableFile(
                f"the archive {path} cannot be used: {exc}",
                expected="an SQLite file of this service's, or none yet, in a folder it may write to",
                remedy="check NOWCAST_ARCHIVE",
            ) from exc

    def save(self, trainings: Iterable[tuple[str, Training]]) -> None:
        """Write trainings, each with whose it is, over what is kept of them.

        Raises:
            sqlite3.Error: The file cannot be written; what it held is still there.
        """
        now = time.time()
        rows = [
            (tenant, one.training, now - one.seen, zlib.compress(one.model_dump_json().encode(), 6))
            for tenant, one in trainings
        ]
        with self._lock, closing(self._connect()) as file, file:
            file.executemany("INSERT OR REPLACE INTO training VALUES (?, ?, ?, ?)", rows)
            file.execute(
                "DELETE FROM training WHERE rowid NOT IN (SELECT rowid FROM training ORDER BY heard DESC LIMIT ?)",
                (self._most,),
            )

    def load(self) -> list[tuple[str, Training]]:
        """All that is kept, the longest silent first. What cannot be read any more is left out.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        with self._lock, closing(self._connect()) as file:
            rows = file.execute("SELECT tenant, whole FROM training ORDER BY heard").fetchall()
        found = []
        for tenant, whole in rows:
            try:
                found.append((tenant, Training.model_validate_json(zlib.decompress(whole))))
            except (zlib.error, ValidationError):
                continue
        return found

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5.0)
