#!/bin/sh
# added.sh <folder> <command...>: run the command, then copy the files of /opt/latentac that it made into the folder.
#
# An image that adds packages to the torch layer copies only these, without the tools that installed them. A command
# that replaced a file of that layer would put torch into two layers: it is refused.
set -eu
folder=$1
shift
before=$(mktemp)
touch /tmp/began
find /opt/latentac -type f | LC_ALL=C sort >"$before"
"$@"
mkdir -p "$folder"
find /opt/latentac ! -type d ! -path /opt/latentac/.lock -cnewer /tmp/began | LC_ALL=C sort >/tmp/added
replaced=$(LC_ALL=C comm -12 "$before" /tmp/added | head -n 5)
if [ -n "$replaced" ]; then
    echo "added.sh: the installation replaced files of the layer below; their locks differ: $replaced" >&2
    exit 1
fi
tar -C / -cf - -T /tmp/added 2>/dev/null | tar -C "$folder" -xf -
