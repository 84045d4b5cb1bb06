"""onnxruntime as these rewards use it: without its telemetry.

Since 1.29 its builds for Linux send events to Microsoft, names and hashes of models among them, and leave an identifier
in the home folder, unless ORT_DISABLE_TELEMETRY is set before it starts. `latentac/__init__.py` sets it.
"""


def import_onnxruntime() -> None:
    """Raises ImportError where it is not installed."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # where somebody has imported it before
