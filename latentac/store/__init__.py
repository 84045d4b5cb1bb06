"""Artifacts on a folder or on S3: published whole or not at all, verified by whoever reads them.

    <key>/manifest.json            what the artifact is: origin, files with size and sha256, parents
    <key>/files-<content>/<path>   its files; <content> is a digest of their paths, sizes and sha256s
    <pointer>                      small JSON that names artifacts: checkpoints/<run>/LATEST, registry/<project>/*.json

Publishing writes the files and then the manifest in one atomic put, so without a manifest there is no artifact.
The files' folder is named by what is in it, because no S3 operation replaces several objects at once: publishing other
content under the same key fills another folder, and the one put of the manifest is the switch. A reader sees the old
artifact or the new one, whole, also when two writers race; one that has read the old manifest can still finish, for
the old folder stays until `delete`. Each `files-...` folder is a plain copy of what was published.

Environment for s3://<bucket>/<prefix> (a secret never enters a URL or a message):

    LATENTAC_S3_ENDPOINT     http://host:port or https://host, required
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY   required;   AWS_SESSION_TOKEN   optional
    AWS_REGION               default AWS_DEFAULT_REGION, else us-east-1
    LATENTAC_S3_CA           file of certificate authorities, default SSL_CERT_FILE, else certifi's
    LATENTAC_COMMIT          commit to write into manifests where there is no git checkout, as in an image

The minio client is not safe across a fork: open the store in the process that uses it.
"""

from latentac.store.artifacts import Store, open_store
from latentac.store.blobs import Entry, Patience
from latentac.store.manifest import File, Manifest, Parent, commit
from latentac.store.pool import copy_folder

__all__ = ["Entry", "File", "Manifest", "Parent", "Patience", "Store", "commit", "copy_folder", "open_store"]
