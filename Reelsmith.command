#!/bin/sh
# Double-click this on macOS; on Linux type: sh Reelsmith.command. It sets up what is missing, then opens the page.
# It needs no Python: it downloads uv, and uv downloads one. docs/install.md
export REELSMITH_STARTED_IN="$PWD"
cd "$(dirname "$0")" || exit 1
if [ -x .venv/bin/python ] && [ ! -f .reelsmith/build.txt ]; then exec .venv/bin/python set_up.py "$@"; fi

# the mistakes that need no Python, before anything is downloaded
refuse() { echo "$1" >&2; exit 2; }
if [ ! -x .reelsmith/uv ]; then
    build=
    case "$1" in
        --build) build=${2:-nothing} ;;
        --build=*) build=${1#--build=} ;;
        "" | -* | update | *.zip | *.ZIP) ;;
        *) refuse "$1: unknown. Type update, update NEW.zip, or nothing to start" ;;
    esac
    case "$build" in
        "" | cu130 | cu126 | rocm | cpu | mac) ;;
        *) refuse "--build $build: there is no such build of torch. Type one of cu130, cu126, rocm, cpu, mac" ;;
    esac
fi

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
download() {
    curl --fail --location --retry 3 --continue-at - --output "$part" \
        "https://github.com/astral-sh/uv/releases/download/$version/uv-$name.tar.gz"
}
is_uv() { case "$(.reelsmith/uv --version 2>/dev/null)" in "uv "*) ;; *) return 1 ;; esac; }
# what was downloaded is deleted last: while it is there, uv may have been unpacked by half
if [ -f "$part" ] || ! is_uv; then
    # a text is a program for the shell, which may do nothing and end well
    if [ -e .reelsmith/uv ]; then
        echo "$PWD/.reelsmith/uv is damaged: it is downloaded again." >&2
        rm -rf .reelsmith/uv
    fi
    echo "Downloading uv $version (about 25 MB) and with it Python 3.12 (about 30 MB) from github.com into $PWD/.reelsmith" >&2
    mkdir -p .reelsmith || exit 1
    if ! is_whole; then
        download || {
            # some servers and proxies know no beginning in the middle of a file
            case $? in 33 | 36) rm -f "$part"; download ;; *) false ;; esac
        } || {
            echo "uv could not be downloaded. Check the connection and the room on the disk; the next start goes on." >&2
            exit 1
        }
    fi
    if ! is_whole; then
        rm -f "$part"
        echo "What was downloaded is not uv $version, so it was deleted and not run. Start again." >&2
        exit 1
    fi
    rm -rf .reelsmith/unpacked && mkdir .reelsmith/unpacked &&
        tar -xzf "$part" -C .reelsmith/unpacked --strip-components 1 &&
        mv -f .reelsmith/unpacked/* .reelsmith/ && rm -r .reelsmith/unpacked && rm -f "$part" || {
        echo "uv could not be unpacked. Free some space on the disk and start again." >&2
        exit 1
    }
fi
if ! .reelsmith/uv python find --system --managed-python 3.12 >/dev/null 2>&1; then
    .reelsmith/uv python install --no-bin 3.12 || {
        echo "Python 3.12 could not be downloaded. Check the connection and the room on the disk, and start again." >&2
        exit 1
    }
fi
exec .reelsmith/uv run --quiet --no-project --managed-python --python 3.12 set_up.py "$@"
