"""The engines that read text from images: tesseract through tesserocr, and RapidOCR on onnxruntime.

An engine is for one thread at a time: `Engines` lends them. Neither uses the network. Tesseract reads the language data
of the system. RapidOCR would download weights that it does not find, so it gets the paths of those in its package.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from latentac.rewards.onnx import import_onnxruntime
from latentac.store import sources
from latentac.system.errors import ConfigError, Problem, describe

MODES = {"page": 3, "block": 6, "line": 7, "word": 8, "sparse": 11}
"""Layout -> page segmentation mode of tesseract."""
_DATA_FOLDERS = (
    "/usr/share/tesseract-ocr/5/tessdata",  # Debian, Ubuntu
    "/usr/share/tesseract-ocr/4.00/tessdata",
    "/usr/share/tessdata",  # Arch, openSUSE
    "/usr/share/tesseract/tessdata",  # Fedora
    "/usr/local/share/tessdata",
    "/opt/homebrew/share/tessdata",
)
_MOST_LENGTH = 30
"""Longer side over shorter side of an image that RapidOCR gets."""
_INSTALL = "Install it where the steps run: pip install 'latentac[ocr]'"


class Engine(Protocol):
    """For one thread at a time."""

    def read(self, image: np.ndarray) -> str:
        """The text in an image, uint8 [H, W, 3]; "" where it finds none."""
        ...


class Engines:
    """At most `most` engines, each built when it is first needed. Calls may come from any thread."""

    def __init__(self, build: Callable[[], Engine], most: int) -> None:
        self._build, self._building = build, threading.Lock()
        self._slots, self._idle = threading.BoundedSemaphore(most), list[Engine]()

    @contextmanager
    def one(self) -> Iterator[Engine]:
        """An engine for this thread alone. Raises ConfigError where none can be built."""
        with self._slots:
            with self._building:
                engine = self._idle.pop() if self._idle else self._build()
            yield engine
            self._idle.append(engine)  # not one that has raised


class Tesseract:
    """The network of tesseract 4 and later, without the older engine, which learns from what it has read before."""

    def __init__(self, folder: str, language: str, layout: str) -> None:
        """Raises ConfigError."""
        try:
            import tesserocr
        except ImportError as error:
            raise _missing("tesseract", "tesserocr", error) from error
        data = data_folder(folder, language)
        try:
            self._api = tesserocr.PyTessBaseAPI(
                path=str(data),
                lang=language,
                psm=MODES[layout],
                oem=tesserocr.OEM.LSTM_ONLY,
                # Of images without a resolution; without it, each has a line about that on stderr.
                variables={"user_defined_dpi": "300", "debug_file": os.devnull},
            )
        except RuntimeError as error:
            problem = f"tesseract cannot use the data of {language!r} there: {describe(error)}"
            raise ConfigError([Problem("language_data", str(data), problem, _remedy(language))]) from error

    def read(self, image: np.ndarray) -> str:
        self._api.SetImage(Image.fromarray(image))
        text: str = self._api.GetUTF8Text()
        self._api.Clear()
        return text


class Rapid:
    """PP-OCR's detector of lines and its recogniser. For one line or word the whole image is the line."""

    def __init__(self, layout: str) -> None:
        """Raises ConfigError."""
        try:
            import_onnxruntime()
            import rapidocr
        except ImportError as error:
            raise _missing("rapidocr", "rapidocr or onnxruntime", error) from error
        models = Path(rapidocr.__file__).parent / "models"
        own = {
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # as in Flow-GRPO: what it reads counts, however sure it is
            "Global.use_det": layout not in ("line", "word"),
            "Global.use_cls": False,  # whether a line stands on its head
            "Det.model_path": str(_model(models, "det")),
            "Rec.model_path": str(_model(models, "rec")),
            # Otherwise the detector enlarges each image until its shorter side has 736 pixels: 50 times the time.
            "Det.limit_type": "min",
            "Det.limit_side_len": 64,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
        try:
            self._engine = rapidocr.RapidOCR(params=own)
            self.read(np.full((64, 192, 3), 255, np.uint8))  # it loads its weights at the first image
        except Exception as error:
            raise _missing("rapidocr", "its weights", error) from error

    def read(self, image: np.ndarray) -> str:
        # Of an image that is longer, RapidOCR would make one without a height or width.
        lacking = [max(0, max(image.shape[:2]) // _MOST_LENGTH - side) for side in image.shape[:2]]
        whole = np.pad(image, [*((0, more) for more in lacking), (0, 0)], mode="edge")
        found: Any = self._engine(np.ascontiguousarray(whole[:, :, ::-1]))
        return " ".join(getattr(found, "txts", None) or ())


def _missing(engine: str, packages: str, error: Exception) -> ConfigError:
    problem = f"cannot be used: {packages} cannot be loaded ({describe(error)})"
    return ConfigError([Problem("engine", engine, problem, _INSTALL)])


def data_folder(given: str, language: str) -> Path:
    """Where the data of each of the languages is. given: a folder, an address of a store, or "". Raises ConfigError."""
    named = sources.or_local(given, "language_data") or os.environ.get("TESSDATA_PREFIX", "")
    places = [named] if named else list(_DATA_FOLDERS)
    for place in places:
        folder = Path(place).expanduser()
        absent = [each for each in language.split("+") if not (folder / f"{each}.traineddata").is_file()]
        if not absent:
            return folder
    problem = f"there is no data of tesseract for {language!r} in {', '.join(places)}"
    raise ConfigError([Problem("language_data", given, problem, _remedy(language))])


def _remedy(language: str) -> str:
    packages = " ".join(f"tesseract-ocr-{each.replace('_', '-')}" for each in language.split("+"))
    return f"Install it (Debian: apt-get install {packages}), or name the folder that has it as language_data"


def _model(folder: Path, kind: str) -> Path:
    """The weights in RapidOCR's package. Raises ConfigError."""
    found = sorted(folder.glob(f"*_{kind}_*.onnx"))
    if not found:
        problem = f"cannot be used: its package has no weights {folder}/*_{kind}_*.onnx, and it shall not download any"
        raise ConfigError([Problem("engine", "rapidocr", problem, f"{_INSTALL} (again)")])
    return found[0]
