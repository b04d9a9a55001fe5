#!/bin/sh
# Double-click this on macOS; on Linux type: sh Reelsmith.command. It sets up what is missing, then opens the page.
# It needs no Python: it downloads uv, and uv downloads one. docs/install.md
export REELSMITH_STARTED_IN="$PWD"
cd "$(dirname "$0")" || exit 1
if [ -x .venv/bin/python ] && [ ! -f .reelsmith/build.txt ]; then exec .venv/bin/python set_up.py "$@"; fi

version=0.11.28
case "$(uname -sm)" in
    "Darwin arm64") name=aarch64-apple-darwin sum=33540eb7c883ab857eff79bd5ac2aa31fe27b595abecb4a9c003a2c998447232 ;;
    "Linux x86_64") name=x86_64-unknown-linux-gnu sum=e490a6464492183c5d4534a5527fb4440f7f2bb2f228162ad7e4afe076dc0224 ;;
    "Linux aarch64") name=aarch64-unknown-linux-gnu sum=03e9fe0a81b0718d0bc84625de3885df6cc3f89a8b6af6121d6b9f6113fb6533 ;;
    *) echo "PyTorch is not made for $(uname -sm), so Reelsmith cannot run here." >&2; exit 1 ;;
esac
part=.reelsmith/uv-$version.part
is_whole() {
    if command -v sha256sum >/dev/null; then echo "$sum  $part" | sha256sum -c - >/dev/null 2>&1
    else echo "$sum  $part" | shasum -a 256 -c - >/dev/null 2>&1; fi
}
export UV_CACHE_DIR="$PWD/.reelsmith/cache" UV_PYTHON_INSTALL_DIR="$PWD/.reelsmith/python"
if [ ! -x .reelsmith/uv ]; then
    echo "Downloading uv $version (about 25 MB) and with it Python 3.12 (about 30 MB) from github.com into $PWD/.reelsmith" >&2
    mkdir -p .reelsmith || exit 1
    if ! is_whole; then
        curl --fail --location --retry 3 --continue-at - --output "$part" \
            "https://github.com/astral-sh/uv/releases/download/$version/uv-$name.tar.gz" || {
            echo "uv could not be downloaded. Check the connection and the room on the disk; the next start goes on." >&2
            exit 1
        }
    fi
    if ! is_whole; then
        rm -f "$part"
        echo "What was downloaded is not uv $version, so it was deleted and not run. Start again." >&2
        exit 1
    fi
    tar -xzf "$part" -C .reelsmith --strip-components 1 && rm "$part" || exit 1
fi
if ! .reelsmith/uv python find --system --managed-python 3.12 >/dev/null 2>&1; then
    .reelsmith/uv python install --no-bin 3.12 || {
        echo "Python 3.12 could not be downloaded. Check the connection and the room on the disk, and start again." >&2
        exit 1
    }
fi
exec .reelsmith/uv run --quiet --no-project --managed-python --python 3.12 set_up.py "$@"
