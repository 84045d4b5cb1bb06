"""Which place a store's URL names: a folder, or a bucket of an S3 server."""

import re
from pathlib import Path

from latentac.store.blobs import Blobs, Folder, Patience
from latentac.system.errors import ConfigError, Problem


def connect(url: str, patience: Patience) -> Blobs:
    """file://<folder>, absolute or relative to the working folder, or s3://<bucket>[/<prefix>]. Touches nothing yet."""
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest:
        return Folder(Path(rest).absolute())
    bucket, _, prefix = rest.strip("/").partition("/")
    names = [name for name in prefix.split("/") if name]
    if scheme == "s3" and re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) and not {".", ".."} & set(names):
        from latentac.store.bucket import Bucket  # half a second of imports that a folder, the default, does without

        return Bucket(bucket, "".join(f"{name}/" for name in names), patience)
    shown = re.sub(r"://.*@", "://***@", url)  # whoever writes credentials into a URL shall not find them in a log
    remedy = "Use file://<folder> or s3://<bucket>/<prefix>; endpoint and credentials of S3 come from the environment"
    raise ConfigError([Problem("store", shown, "is not the URL of a folder or a bucket", remedy)])
