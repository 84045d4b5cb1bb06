#!/usr/bin/env bash
# Make the environment of this checkout from the lock.
#
#     install.sh <environment> <python>     install, or bring up to date
#     install.sh --uv <python>              only print a uv that works, fetched if there is none
#
# Needs Python 3.11 to 3.13, and one of: uv on PATH, the venv module with ensurepip, pip.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'make install: %s\n' "$1" >&2
    exit 1
}

check_python() {
    command -v "$1" >/dev/null || fail "there is no $1. On Debian: apt-get install python3 python3-venv. Another one: make install PYTHON=/path/to/python3"
    "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
        fail "$1 is $("$1" -V 2>&1), but 3.11 to 3.13 is needed. Another one: make install PYTHON=/path/to/python3"
}

# The pinned uv goes into a folder of its own. Neither way below touches the system's packages, so a Python that
# is marked as externally managed (PEP 668) does not object.
fetch_uv() {
    local python=$1 log
    log=$(mktemp)
    rm -rf .installer
    if "$python" -m venv .installer >"$log" 2>&1 &&
        .installer/bin/python -m pip install -q --require-hashes -r requirements/installer.lock >>"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    rm -rf .installer
    if "$python" -m pip --version >/dev/null 2>&1 &&
        "$python" -m pip install -q --target .installer --require-hashes -r requirements/installer.lock >>"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    rm -rf .installer
    tail -n 5 "$log" >&2
    rm -f "$log"
    fail "found no uv, and neither venv nor pip of $python could fetch it. On Debian: apt-get install python3-venv"
}

find_uv() {
    if uv --version >/dev/null 2>&1; then
        echo uv
        return
    fi
    .installer/bin/uv --version >/dev/null 2>&1 || fetch_uv "$1"
    echo .installer/bin/uv
}

if [[ $1 == --uv ]]; then
    check_python "$2"
    find_uv "$2"
    exit
fi

environment=$1
python=$2
check_python "$python"
uv=$(find_uv "$python")
unfinished=$environment/.unfinished
quiet=()
[[ -t 2 ]] || quiet=(-q)

# Bytecode for what a run imports, 5,600 files; for all 18,000 it would take three times as long. Without it the first
# run would pay, or every run where the variable below is set.
compile_imports() {
    local output
    output=$("$environment/bin/python" -c "$1" 2>&1) || {
        tail -n 5 <<<"$output" >&2
        return 1
    }
}

# An installation that was cut short may have left half a package: start again, it costs seconds.
if [[ -e $unfinished || ! -x $environment/bin/python ]]; then
    rm -rf "$environment"
    "$uv" venv -q --python "$python" "$environment"
fi
touch "$unfinished"
echo "installing requirements/dev.lock into $environment (the first time on a machine downloads about 3 GB)" >&2
"$uv" pip sync "${quiet[@]}" --python "$environment" --require-hashes requirements/dev.lock
"$uv" pip install -q --python "$environment" --no-build-isolation --no-deps --editable .
rm -rf "$environment/optimizers" # where only the tests that need it look
"$uv" pip install -q --python "$environment" --target "$environment/optimizers" --no-deps --require-hashes \
    -r requirements/optimizers.lock
unset PYTHONDONTWRITEBYTECODE
compile_imports "
import torch, torch.distributed.run, torch._dynamo, peft, transformers.models.clip.modeling_clip
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
import diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3" &
diffusion=$!
compile_imports "
import kfp.local, kfp.compiler, kserve, torchx.runner, minio, jinja2, tqdm
import scipy.ndimage, matplotlib.figure, matplotlib.backends.backend_agg" || fail "the installed kfp, kserve or torchx cannot be imported"
wait "$diffusion" || fail "the installed torch, diffusers or transformers cannot be imported"
rm "$unfinished"
echo "installed in $SECONDS s" >&2
