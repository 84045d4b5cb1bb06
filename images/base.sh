#!/usr/bin/env bash
# base.sh <tar>: make a Python base without an image registry, as a tar for `docker import`.
#
# Debian bookworm by debootstrap: its minimum, Python 3.11 and tini. Needs root, debootstrap and a Debian mirror
# (DEBIAN_MIRROR). The machine's authorities go in, so that a build behind a proxy of the site can verify its mirror.
set -euo pipefail

target=$1
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
authorities=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

[[ $EUID -eq 0 ]] || { echo "base.sh: making a base needs root. Name one instead: make images BASE=<image>" >&2; exit 1; }
command -v debootstrap >/dev/null ||
    { echo "base.sh: there is no debootstrap (apt-get install debootstrap). Or name a base: make images BASE=<image>" >&2; exit 1; }

mkdir -p "$(dirname "$target")"
folder=$(mktemp -d "$(dirname "$target")/base.XXXXXX")
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,tini bookworm "$folder/tree" "$mirror" \
    >"$folder/log" 2>&1 || { tail -n 5 "$folder/log" >&2; exit 1; }
[[ ! -e $authorities ]] || cat "$authorities" >"$folder/tree/etc/ssl/certs/ca-certificates.crt"
rm -rf "$folder/tree"/var/cache/apt/* "$folder/tree"/var/lib/apt/lists/* "$folder/tree"/var/log/* \
    "$folder/tree"/usr/share/{doc,man,info,locale}/*
tar --numeric-owner --exclude=./dev/* -C "$folder/tree" -cf "$folder/tar" .
mv "$folder/tar" "$target"
