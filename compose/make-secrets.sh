#!/bin/sh
# Makes the secrets of cluster.yaml once: the database's password and the DSN that contains it. Never overwrites.
# The directory is 0700; the files are readable in it, because a container's user, whose uid is not yours, reads them.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "secrets/ is there already; nothing done." >&2
    exit 0
fi
password=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
made=$(mktemp -d ./secrets.XXXXXX) # 0700
printf '%s' "$password" >"$made/postgres-password"
printf '%s' "postgres://gatehouse:$password@postgres:5432/gatehouse" >"$made/gatehouse-dsn"
chmod 0444 "$made/postgres-password" "$made/gatehouse-dsn"
mv "$made" secrets
echo "secrets/ made." >&2
