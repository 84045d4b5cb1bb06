"""The trained model behind an address: one exported folder, one KServe server, steering a request.

`exported` is the folder's own description, `request` what a caller may ask for, `generator` the images, `pipeline`
the same for a script, `model` the KServe model over it, `server` the process (`python -m latentac.serving`), `client`
that server by its address, `process` as a child process, `deployment` the proof that it serves. Importing this package
imports neither torch nor KServe.
"""

from latentac.serving.server import serve

__all__ = ["serve"]
