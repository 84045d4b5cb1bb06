"""Push the images of a commit, sign them, attest what is in them and where they come from: `make release-images`.

Cosign signs each image by the digest that the registry gave it, and attests its bill of materials (images/sbom.py) and
its SLSA provenance (images/provenance.py). All of it is then verified as a cluster would. What was released stands
in build/images/release.json, and build/images/values.yaml has it as values for the chart.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from docker import DockerClient
from docker.errors import DockerException, ImageNotFound

from images import sbom
from images.build import NAMES, OCI, OUTPUT, ROOT, revision
from images.provenance import provenance
from latentac import __version__
from tools.binaries import program
from tools.docker import Docker, daemon
from tools.golang import Unavailable

RELEASED = tuple(name for name in NAMES if name != "torch")
# What cosign calls a type, and the predicate that a verifier finds.
ATTESTED = {"cyclonedx": "https://cyclonedx.org/bom", "slsaprovenance1": "https://slsa.dev/provenance/v1"}
# By these a CI says that it gives its jobs identities.
TOKENS = ("SIGSTORE_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "BUILDKITE_AGENT_ACCESS_TOKEN")
TOKEN_FILE = Path("/var/run/sigstore/cosign/oidc-token")
SIGNATURE = "https://sigstore.dev/cosign/sign/v1"
ASK_SECONDS = 10.0
COSIGN_SECONDS = 300.0


@dataclass(frozen=True)
class Signer:
    """By whom images are signed. key: a file or a KMS's address; without one, the identity that issuer vouches for.

    log: whether signatures go into the transparency log. They must, where there is no key.
    """

    key: str = ""
    identity: str = ""
    issuer: str = ""
    log: bool = True

    def problems(self) -> list[str]:
        """Why nothing could be signed, each with its remedy."""
        found = []
        if self.key and "://" not in self.key:
            if not Path(self.key).is_file():
                found.append(f"COSIGN_KEY={self.key} is not a file: `cosign generate-key-pair` makes one")
            if "COSIGN_PASSWORD" not in os.environ:
                found.append("COSIGN_PASSWORD is not in the environment: export it (empty for a key without one)")
        if not self.key:
            if not any(os.environ.get(name) for name in TOKENS) and not TOKEN_FILE.exists():
                found.append(
                    f"there is no key and no identity: give COSIGN_KEY=<file>, or run where a CI gives its jobs "
                    f"identity tokens ({', '.join(TOKENS)})"
                )
            if not (self.identity and self.issuer):
                found.append("without COSIGN_KEY, IDENTITY and ISSUER must say whose signature is the right one")
            if not self.log:
                found.append(
                    "without COSIGN_KEY there is no signature outside of the transparency log: leave TLOG=no out"
                )
        return found

    @contextlib.contextmanager
    def signing(self) -> Iterator[list[str]]:
        """Options of `cosign sign` and `cosign attest`."""
        with tempfile.TemporaryDirectory() as folder:
            yield ["--yes", *(["--key", self.key] if self.key else []), *self._without_log(Path(folder), signing=True)]

    @contextlib.contextmanager
    def verifying(self) -> Iterator[list[str]]:
        """Options of `cosign verify` and `cosign verify-attestation`."""
        with tempfile.TemporaryDirectory() as folder:
            who = ["--certificate-identity", self.identity, "--certificate-oidc-issuer", self.issuer]
            if self.key:
                public = Path(folder) / "cosign.pub"
                public.write_text(self.public_key())
                who = ["--key", str(public)]
            yield [*who, *self._without_log(Path(folder), signing=False)]

    def _without_log(self, folder: Path, *, signing: bool) -> list[str]:
        """Lists of services without any, so that cosign asks nobody on the Internet for the public ones."""
        if self.log:
            return []
        services, roots = str(folder / "services.json"), str(folder / "roots.json")
        cosign("trusted-root", "create", "--out", roots)
        if not signing:
            return ["--trusted-root", roots, "--insecure-ignore-tlog"]
        cosign("signing-config", "create", "--out", services)
        return ["--trusted-root", roots, "--signing-config", services]

    def public_key(self) -> str:
        """In PEM; empty without a key. Raises Unavailable if the key cannot be opened."""
        return cosign("public-key", "--key", self.key) if self.key else ""


def cosign(*arguments: str) -> str:
    """stdout of cosign. Passwords and tokens reach it by the environment alone. Raises Unavailable with its stderr."""
    command = [cosign_program(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COSIGN_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"cosign {arguments[0]} did not end within {COSIGN_SECONDS:.0f} s: the registry or Sigstore's services do "
            "not answer. TLOG=no needs none of the latter."
        ) from None
    if done.returncode:
        raise Unavailable(f"cosign {arguments[0]} ended with {done.returncode}:\n{done.stderr[-2000:].strip()}")
    return done.stdout


def cosign_program() -> str:
    """cosign on PATH, else that of the tests. Raises Unavailable."""
    found = shutil.which("cosign")
    try:
        return found or str(program("cosign"))
    except Unavailable:
        raise Unavailable("cosign is not on PATH: install it (docs.sigstore.dev), or `make node-build`") from None


def sign(signer: Signer, subject: str, predicates: Mapping[str, Path]) -> None:
    """Sign the image `name@sha256:...` and attest to it a file of each type of ATTESTED. Raises Unavailable."""
    with signer.signing() as options:
        cosign("sign", *options, subject)
        for kind, file in predicates.items():
            cosign("attest", *options, "--type", kind, "--predicate", str(file), subject)


def verify(signer: Signer, subject: str, predicates: Mapping[str, Path]) -> None:
    """Find the signature and each of these attestations by this signer, as a cluster would. Raises Unavailable."""
    with signer.verifying() as options:
        found = json.loads(cosign("verify", *options, subject))
        if SIGNATURE not in (each["critical"]["type"] for each in found):  # cosign takes an attestation for one, too
            raise Unavailable(f"{subject} has attestations and no signature by this signer: release it again")
        for kind, file in predicates.items():
            output = cosign("verify-attestation", *options, "--type", kind, subject).splitlines()
            statements = [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in output]
            if json.loads(file.read_text()) not in (each["predicate"] for each in statements):
                raise Unavailable(f"{subject}: what was attested as {kind} is not what {file} says: release it again")


def split(prefix: str) -> tuple[str, str]:
    """Registry and path of an image's name; the registry is empty where the name has none."""
    first, _, rest = prefix.partition("/")
    return (first, rest) if rest and (set(".:") & set(first) or first == "localhost") else ("", prefix)


def problems(signer: Signer, prefix: str) -> list[str]:
    """What can be known without docker that stops a release, each with its remedy."""
    found = signer.problems()
    commit = revision()
    if commit == "unknown" or commit.endswith("-dirty"):
        found.append("the tree has changes that are in no commit (`git status`): a release comes from a commit")
    try:
        cosign_program()
    except Unavailable as error:
        found.append(str(error))
    registry, _ = split(prefix)
    if not registry:
        found.append(f"PREFIX={prefix} names no registry: give one, such as PREFIX=registry.example.com/ml/latentac")
    else:
        with contextlib.suppress(urllib.error.HTTPError):  # it wants to know who asks: it is there
            try:
                loopback = registry.partition(":")[0] in ("localhost", "127.0.0.1")
                address = f"{'http' if loopback else 'https'}://{registry}/v2/"
                urllib.request.urlopen(address, timeout=ASK_SECONDS).close()  # noqa: S310  # http or https, see above
            except urllib.error.HTTPError:
                raise
            except OSError as error:
                found.append(f"no registry answers at {address}: {error}. Correct PREFIX, or the way there")
    return found


def missing(client: DockerClient, names: Sequence[str], prefix: str, tag: str) -> list[str]:
    """Images that are not built, or not from this commit."""
    found, commit = [], revision()
    for name in names:
        remedy = f"`make images IMAGES={name} PREFIX={prefix} TAG={tag}` builds it"
        try:
            built = client.images.get(f"{prefix}/{name}:{tag}").labels.get(f"{OCI}revision", "")
        except ImageNotFound:
            found.append(f"there is no image {prefix}/{name}:{tag}: {remedy}")
            continue
        if name != "minio" and built != commit:  # MinIO's revision is its own
            found.append(f"{prefix}/{name}:{tag} was built from {built or 'no commit'}, and this is {commit}: {remedy}")
    return found


def push(client: DockerClient, repository: str, tag: str) -> str:
    """Push an image and give the digest that the registry answered. Raises Unavailable."""
    digest = ""
    try:
        for line in client.api.push(repository, tag, stream=True, decode=True):
            if "error" in line:
                raise Unavailable(f"{repository}:{tag} was not pushed: {line['error']}. `docker login` may be missing")
            digest = line.get("aux", {}).get("Digest", digest)
    except DockerException as error:
        raise Unavailable(f"{repository}:{tag} was not pushed: {error}") from None
    return digest


def values(signer: Signer, prefix: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Values of the chart: these images by digest, and who must have signed them."""
    registry, path = split(prefix)
    images = {
        name: {"registry": registry, "repository": f"{path}/{name}", "digest": digest}
        for name, digest in digests.items()
    }
    policy: dict[str, Any] = {"images": list(digests), "transparencyLog": signer.log}
    if signer.key:
        policy["publicKey"] = signer.public_key()
    else:
        policy["keyless"] = {"issuer": signer.issuer, "subject": signer.identity}
    return {"images": images, "imagePolicy": policy}


def release(
    docker: Docker, client: DockerClient, signer: Signer, names: Sequence[str], *, prefix: str, tag: str, builder: str
) -> None:
    """Push, sign, attest, verify; then write what was released. Raises Unavailable."""
    digests, about = {}, {}
    for name in names:
        repository = f"{prefix}/{name}"
        bill = sbom.write(docker, client, name, prefix, tag)
        image = client.images.get(f"{repository}:{tag}")
        origin = OUTPUT / f"{name}.provenance.json"
        origin.write_text(json.dumps(provenance(name, image.labels, builder), indent=2) + "\n")
        digests[name] = push(client, repository, tag)
        subject = f"{repository}@{digests[name]}"
        print(f"pushed {subject}", flush=True)
        predicates = {"cyclonedx": bill, "slsaprovenance1": origin}
        sign(signer, subject, predicates)
        verify(signer, subject, predicates)
        print(f"signed and verified {subject}", flush=True)
        about[name] = {"reference": subject, "tag": tag, "id": image.id, "attested": list(ATTESTED.values())}
    content = {"revision": revision(), "version": __version__, "images": about}
    (OUTPUT / "release.json").write_text(json.dumps(content, indent=2) + "\n")
    (OUTPUT / "values.yaml").write_text(yaml.safe_dump(values(signer, prefix, digests), sort_keys=False))
    for file in ("release.json", "values.yaml"):
        print(f"wrote {(OUTPUT / file).relative_to(ROOT)}")


def refuse(found: Sequence[str]) -> None:
    if found:
        raise Unavailable("nothing was pushed:\n" + "\n".join(f"- {each}" for each in found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m images.publish", description="push, sign and attest the images")
    parser.add_argument("names", nargs="*", metavar="image", help=f"of {', '.join(RELEASED)} (default: all)")
    parser.add_argument("--prefix", default="latentac", help="registry and path before each name")
    parser.add_argument("--tag", default=__version__, help="of each image (default: %(default)s)")
    parser.add_argument("--key", default="", help="private key of cosign: a file, or the address of a KMS")
    parser.add_argument("--identity", default="", help="without a key: whose signature the right one is")
    parser.add_argument("--issuer", default="", help="without a key: who vouches for that identity")
    parser.add_argument("--log", choices=["yes", "no"], default="yes", help="whether to use the transparency log")
    parser.add_argument("--builder", default="", help="address that names the platform that built the images")
    options = parser.parse_args()
    signer = Signer(options.key, options.identity, options.issuer, options.log == "yes")
    names = options.names or RELEASED
    try:
        refuse([f"IMAGES names {name}; there are {', '.join(RELEASED)}" for name in sorted({*names} - {*RELEASED})])
        refuse(problems(signer, options.prefix))
        signer.public_key()  # opens the key before anything is pushed
        with daemon() as docker, contextlib.closing(docker.client()) as client:
            refuse(missing(client, names, options.prefix, options.tag))
            release(docker, client, signer, names, prefix=options.prefix, tag=options.tag, builder=options.builder)
    except (Unavailable, subprocess.SubprocessError) as error:
        sys.exit(f"make release-images: {error}")


if __name__ == "__main__":
    main()
