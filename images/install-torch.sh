#!/bin/sh
# install-torch.sh <environment> <lock>: make the environment from the lock, with torch for $TORCH_BACKEND.
#
# cuda is the registry's own Linux wheel: every file is hashed by the lock. For another backend everything but torch
# and its CUDA libraries comes from the lock; torch itself, of the lock's version, comes with the libraries of that
# backend from PyTorch's index, which uv knows. cpu has no such libraries, so $TORCH_SHA256 can vouch for all of it.
set -eu
environment=$1
lock=$2
backend=${TORCH_BACKEND:-cuda}
digest=${TORCH_SHA256:-}
uv=/opt/tools/bin/uv

if [ -n "$digest" ] && [ "$backend" != cpu ]; then
    echo "TORCH_SHA256 is for TORCH_BACKEND=cpu: the lock has the hashes of cuda, and $backend has further files" >&2
    exit 1
fi

"$uv" venv -q --python python3 "$environment"
if [ "$backend" = cuda ]; then
    exec "$uv" pip install -q --python "$environment" --require-hashes -r "$lock"
fi

# A requirement and its hashes are one paragraph: the lines after its name are indented.
awk '/^[a-z]/ { keep = $0 !~ /^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/ } keep' "$lock" >/tmp/without-torch.txt
"$uv" pip install -q --python "$environment" --no-deps --require-hashes -r /tmp/without-torch.txt
version=$(sed -n 's/^torch==\([^ ]*\) .*/\1/p' "$lock")
if [ "$backend" = cpu ]; then
    echo "torch==$version${digest:+ --hash=sha256:$digest}" >/tmp/torch.txt
    exec "$uv" pip install -q --python "$environment" --no-deps ${digest:+--require-hashes} --torch-backend cpu -r /tmp/torch.txt
fi
exec "$uv" pip install -q --python "$environment" --torch-backend "$backend" "torch==$version"
