#!/bin/sh
# Runs a command beside a PostgreSQL of its own, which ends with it:
#   tests/postgres.sh .venv/bin/python -m pytest tests/contracts/test_store.py
set -eu
bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -1)
[ -n "$bin" ] || { echo "PostgreSQL is not installed: apt-get install postgresql" >&2; exit 2; }
folder=$(mktemp -d)
as=""
if [ "$(id -u)" = 0 ]; then # it refuses to be run by root
  chown postgres "$folder"
  chmod 755 "$folder"
  as="setpriv --reuid=postgres --regid=postgres --clear-groups"
fi
trap '$as "$bin/pg_ctl" -D "$folder/data" -m immediate -s stop; rm -rf "$folder"' EXIT
$as "$bin/initdb" -D "$folder/data" -A trust -U weaver >/dev/null
$as "$bin/pg_ctl" -D "$folder/data" -o "-c listen_addresses= -k $folder" -l "$folder/log" -s -w start
WEAVER_TEST_POSTGRES_URL="postgresql+psycopg:///postgres?user=weaver&host=$folder" "$@"
