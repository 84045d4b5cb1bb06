"""Scores that a judge has given, kept in a file of SQLite: an image is not judged twice, nor paid for twice."""

import logging
import sqlite3
import threading
from pathlib import Path

from latentac.system.errors import ConfigError, Problem, describe

FILE = "judgements.sqlite"
_LOCKED_SECONDS = 30.0
_log = logging.getLogger(__name__)


class Judgements:
    """At most `most` scores by key; the oldest give way. Several processes and threads may use one folder.

    Each score is written as a whole or not at all, whenever the process ends. What goes wrong with the file is logged
    once, and scoring goes on without it.
    """

    def __init__(self, folder: str, most: int) -> None:
        """Raises ConfigError where the folder cannot be made."""
        self._most, self._lock, self._file = most, threading.Lock(), Path(folder).expanduser() / FILE
        self._held: sqlite3.Connection | None = None
        self._failed = False
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be made: {error.strerror or describe(error)}"
            raise ConfigError([Problem("judgements", folder, problem, "Name a folder that can be written")]) from error

    def get(self, key: str) -> float | None:
        """None where it is not known."""
        try:
            with self._lock:
                row = self._open().execute("SELECT score FROM judgements WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._warn(error)
            return None
        return None if row is None else float(row[0])

    def put(self, key: str, score: float) -> None:
        oldest = "DELETE FROM judgements WHERE place <= (SELECT MAX(place) FROM judgements) - ?"
        try:
            with self._lock, self._open() as held:
                held.execute("INSERT OR REPLACE INTO judgements (key, score) VALUES (?, ?)", (key, score))
                held.execute(oldest, (self._most,))
        except sqlite3.Error as error:
            self._warn(error)

    def _open(self) -> sqlite3.Connection:
        if self._held is None:
            held = sqlite3.connect(self._file, timeout=_LOCKED_SECONDS, check_same_thread=False)
            with held:
                held.execute(
                    "CREATE TABLE IF NOT EXISTS judgements"
                    " (place INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, score REAL NOT NULL)"
                )
            self._held = held
        return self._held

    def _warn(self, error: sqlite3.Error) -> None:
        if not self._failed:
            self._failed = True
            _log.warning("%s cannot be used, and nothing is kept: %s", self._file, describe(error))
