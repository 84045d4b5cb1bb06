#!/usr/bin/env bash
# Build the wheel, install it into fresh environments with the oldest and the newest versions that its metadata allows,
# and run the small pipeline from each, outside the checkout.
#
#     test-wheel.sh <python>     the newest versions move: a failure there may be a new release of a dependency
#     VERSIONS=oldest test-wheel.sh <python>     one of the two
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(bash requirements/install.sh --uv "$1")
folder=$(mktemp -d "${TMPDIR:-/var/tmp}/latentac-wheel.XXXXXX")
trap 'rm -rf "$folder"' EXIT

"$uv" build -q --no-build-isolation --python .venv/bin/python --wheel -o "$folder"
wheel=$(echo "$folder"/latentac-*.whl)

for versions in ${VERSIONS:-oldest newest}; do
    environment=$folder/$versions
    "$uv" venv -q --python "$1" "$environment"
    if [[ $versions == oldest ]]; then # of what pyproject.toml names; what those packages need is the newest
        "$uv" pip install -q --python "$environment" --resolution lowest-direct -r pyproject.toml --all-extras
        "$uv" pip install -q --python "$environment" --no-deps "$wheel"
    else
        "$uv" pip install -q --python "$environment" "$wheel[all]"
    fi
    installed=$("$uv" pip list -q --python "$environment" | awk '/^(torch|diffusers|transformers|kfp|kserve) / { printf "%s %s  ", $1, $2 }')
    echo "$versions: $installed"
    mkdir "$folder/run-$versions"
    (cd "$folder/run-$versions" && HF_HUB_OFFLINE=1 "$environment/bin/latentac" run --recipe shapes-unet-smoke)
    rm -rf "$environment"
done
