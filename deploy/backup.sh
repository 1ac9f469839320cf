#!/bin/sh
# Backs up a running server: deploy/backup.sh HOME TARGET, TARGET being a new folder.
# With WEAVER_DATABASE_URL=postgresql://..., the database is dumped; else HOME has an SQLite file.
#
# First the database, then the files: what the database refers to must be among them. A snapshot that
# it refers to is not pruned while the file `keep` is there; newer ones are overwritten in time.
set -eu
home=${1:?HOME and TARGET} target=${2:?TARGET, a new folder}
[ -d "$home" ] || { echo "error: there is no home $home" >&2 && exit 1; }
keep() { # live/ is there from the first snapshot on, and the server's user makes it
  [ ! -d "$home/live" ] || touch "$home/live/keep"
}
mkdir "$target"
trap 'rm -f "$home/live/keep"' EXIT
keep
case "${WEAVER_DATABASE_URL:-}" in
'' | sqlite*)
  file=${WEAVER_DATABASE_URL:-} && file=${file#sqlite:///}
  python3 - "${file:-$home/server.db}" "$target/server.db" <<'PYTHON'
import os, sqlite3, sys
os.umask(0o077)
with sqlite3.connect(f"file:{sys.argv[1]}?mode=rw", uri=True) as source:
    source.backup(sqlite3.connect(sys.argv[2]))
PYTHON
  ;;
*) (umask 077 && pg_dump --format=custom --file="$target/server.dump" "$WEAVER_DATABASE_URL") ;;
esac
keep
for folder in runs live; do
  if [ -d "$home/$folder" ]; then
    # A checkpoint that is deleted in this moment makes one copy fail, not the next.
    cp -a "$home/$folder" "$target/" || { rm -rf "${target:?}/$folder" && cp -a "$home/$folder" "$target/"; }
  fi
done
rm -f "$target/live/keep"
