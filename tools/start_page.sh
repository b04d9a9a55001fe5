#!/bin/sh
# Open the page of a container to its network, behind a secret word that stays on the volume: docs/rented.md
set -eu
umask 077
token=/data/token.txt
if [ ! -s "$token" ]; then
    python -c "import secrets; print(secrets.token_urlsafe())" > "$token"
fi
exec python /opt/reelsmith/reelsmith.py browser /data --host 0.0.0.0 --port 8765 --token "$token" --models /models --no_open "$@"
