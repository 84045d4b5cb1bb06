"""Scores that are kept: by image, prompt with its metadata, and reward with its settings and code."""

import hashlib
import json
import logging
import math
import sqlite3
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentac.config.schema import Reward as RewardSettings
from latentac.system.errors import describe
from latentac.worlds.prompts import Prompt

_FILE = "scores.sqlite"
_WAIT_SECONDS = 10.0
_log = logging.getLogger(__name__)


class ScoreCache:
    """The newest `cached_scores` scores in memory, and in a file if there is a folder. Calls may come from any thread.

    An error is not kept, and neither is a number that is not finite: `score` raises for both.
    """

    def __init__(self, settings: RewardSettings, code: str) -> None:
        """code: digest of the code of the reward's class."""
        own = json.dumps([settings.use, settings.own, code], sort_keys=True, default=str)
        self._reward = hashlib.sha256(own.encode()).digest()
        self._most = settings.cached_scores
        self._scores: OrderedDict[str, float] = OrderedDict()
        self._file = _File(Path(settings.scores_folder)) if settings.scores_folder else None
        self._lock = threading.Lock()
        self._hits = self._asked = 0

    def scores(
        self,
        images: np.ndarray,
        prompts: Sequence[Prompt],
        score: Callable[[np.ndarray, Sequence[Prompt]], np.ndarray],
    ) -> np.ndarray:
        """float32 [B]: the scores that are known, and for the other images those of `score`, which are then kept."""
        keys = [self._key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        known = self._known(keys)
        missing = [index for index, key in enumerate(keys) if key not in known]
        if missing:
            whole = len(missing) == len(keys)
            found = score(images if whole else images[missing], [prompts[index] for index in missing])
            new = {keys[index]: float(value) for index, value in zip(missing, found, strict=True)}
            self._keep(new)
            known |= new
        with self._lock:
            self._asked += len(keys)
            self._hits += len(keys) - len(missing)
        return np.array([known[key] for key in keys], np.float32)

    def take_counts(self) -> tuple[int, int]:
        """How many images were asked for since the last time, and how many of them were known."""
        with self._lock:
            counts = self._asked, self._hits
            self._hits = self._asked = 0
        return counts

    def _key(self, image: np.ndarray, prompt: Prompt) -> str:
        """sha256, hex."""
        about = json.dumps([image.shape, str(image.dtype), prompt.text, prompt.metadata], sort_keys=True, default=str)
        digest = hashlib.sha256(self._reward + hashlib.sha256(about.encode()).digest())
        digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def _known(self, keys: Sequence[str]) -> dict[str, float]:
        with self._lock:
            known = {key: self._scores[key] for key in keys if key in self._scores}
            for key in known:
                self._scores.move_to_end(key)
        missing = [key for key in keys if key not in known]
        if self._file is not None and missing:
            stored = self._file.read(missing)
            self._remember(stored)
            known |= stored
        return known

    def _keep(self, scores: Mapping[str, float]) -> None:
        self._remember(scores)
        if self._file is not None:
            self._file.write(scores)

    def _remember(self, scores: Mapping[str, float]) -> None:
        with self._lock:
            self._scores.update(scores)
            while len(self._scores) > self._most:
                self._scores.popitem(last=False)


class _File:
    """Scores in a file that processes share. Where it cannot be used, it is left alone, and training goes on."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / _FILE, timeout=_WAIT_SECONDS, check_same_thread=False)
            with self._database:
                self._database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            self._leave(folder, error)
        self._folder = folder

    def read(self, keys: Iterable[str]) -> dict[str, float]:
        found = {}
        with self._lock:
            if self._database is None:
                return {}
            try:
                for key in keys:
                    row = self._database.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
                    if row is not None and isinstance(row[0], float) and math.isfinite(row[0]):
                        found[key] = row[0]
            except sqlite3.Error as error:
                self._leave(self._folder, error)
        return found

    def write(self, scores: Mapping[str, float]) -> None:
        with self._lock:
            if self._database is None:
                return
            try:
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", list(scores.items()))
            except sqlite3.Error as error:
                self._leave(self._folder, error)

    def _leave(self, folder: Path, error: Exception) -> None:
        self._database = None
        _log.warning("%s: scores are no longer kept in this folder (%s)", folder, describe(error))


def code_digest(reward: Any) -> str:
    """sha256 of the Python files beside the one of the reward's class, in its package; of its file where it is in none;
    "" where there is no file."""
    module = sys.modules.get(type(reward).__module__)
    place = getattr(module, "__file__", None)
    if place is None:
        return ""
    file = Path(place)
    files = sorted(file.parent.glob("*.py")) if getattr(module, "__package__", "") else [file]
    digest = hashlib.sha256()
    for each in files:
        if each.is_file():
            digest.update(each.name.encode() + b"\0" + each.read_bytes())
    return digest.hexdigest()
