"""onnxruntime as these rewards use it: without its telemetry.

Since 1.29 its builds for Linux send events to Microsoft, names and hashes of models among them, and leave an identifier
in the home folder, unless ORT_DISABLE_TELEMETRY is set before it starts.
"""

import os


def import_onnxruntime() -> None:
    """Before anything else imports it. Raises ImportError where it is not installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # where somebody has imported it before
