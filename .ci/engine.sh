#!/usr/bin/env bash
# Make sure a container engine runs and a base image is at hand, then print the settings a build needs.
#
#   eval "$(bash .ci/engine.sh)"     # messages go to stderr, `export NAME=value` lines to stdout
#   bash .ci/engine.sh stop          # stop the engine, if it was this script that started it
#
# What it does, each step only where needed, so that a second run costs a second:
#   1. installs engine, compose and debootstrap from the system's packages (Debian or Ubuntu, as root);
#   2. starts the engine;
#   3. takes the official Python image where it can be pulled (or lies here already); else makes a base image of the
#      same contents from the system's own package mirror, and beside it a build image that knows this machine's pip
#      settings, certificates and local wheels, none of which reach the final image.
# Exit status: 0 ready, 1 an engine could not be had.
set -euo pipefail

OFFICIAL=${NOWCAST_OFFICIAL_IMAGE:-python:3.11-slim}
BASE=nowcast-base:local
BUILD=nowcast-build:local
STATE=${NOWCAST_ENGINE_STATE:-/var/tmp/nowcast-engine}

say() { echo "engine: $*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

packages() {
    have apt-get || { say "no apt-get here: install a container engine, Compose and debootstrap by hand"; exit 1; }
    say "installing $*"
    as_root apt-get update -qq >&2 || say "the package lists could not all be refreshed; going on with what is there"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2 </dev/null
}

start_engine() {
    mkdir -p "$STATE"
    timeout 20 docker info >/dev/null 2>&1 && return
    local missing=()
    have dockerd || missing+=(docker.io iptables)
    have docker-compose || docker compose version >/dev/null 2>&1 || missing+=(docker-compose)
    [ ${#missing[@]} = 0 ] || packages "${missing[@]}"
    say "starting the engine (its log: $STATE/dockerd.log)"
    # A session of its own and no inherited streams: the engine must outlive this script and hold nobody's pipe open.
    as_root setsid nohup dockerd >"$STATE/dockerd.log" 2>&1 </dev/null &
    touch "$STATE/started-here"
    for _ in $(seq 60); do
        timeout 5 docker info >/dev/null 2>&1 && return
        sleep 1
    done
    tail -n 20 "$STATE/dockerd.log" >&2
    say "the engine did not come up within a minute"
    exit 1
}

present() { docker image inspect "$1" >/dev/null 2>&1; }

# The machine's own archive, read from its package manager.
archive() { apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' | awk -v s="$1" '$2==s && $3=="main" {print $1; exit}'; }

make_base() {
    present "$BASE" && return
    have debootstrap || packages debootstrap
    local suite mirror root
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(archive "$suite")
    [ -n "$mirror" ] || { packages debootstrap; mirror=$(archive "$suite"); }
    root=$(mktemp -d "$STATE/root.XXXXXX")
    say "making a base image of $suite"
    as_root debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root" "$mirror" \
        >"$STATE/debootstrap.log" 2>&1 </dev/null || { tail -n 20 "$STATE/debootstrap.log" >&2; exit 1; }
    as_root rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info} "$root"/var/log/*
    as_root tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$BASE" >&2
    as_root rm -rf "$root"
}

# Local folders that pip's settings name: `find-links`, as paths or file: URLs.
wheel_folders() {
    { pip config list 2>/dev/null || python3 -m pip config list; } \
        | sed -n "s/.*find-links='\(.*\)'\$/\1/p" | sed 's/\\n/ /g' | tr ' ' '\n' | sed 's#^file://##' | sort -u \
        | while read -r folder; do if [ -d "$folder" ]; then echo "$folder"; fi; done
}

pip_setting() {
    { pip config list 2>/dev/null || python3 -m pip config list; } | sed -n "s/^\(global\|:env:\|install\)\.$1='\(.*\)'\$/\2/p" | tail -n 1
}

make_build() {
    present "$BUILD" && return
    local context certificates index folder n=0
    context=$(mktemp -d "$STATE/build.XXXXXX")
    certificates=$(pip_setting cert)
    [ -n "$certificates" ] || certificates=/etc/ssl/certs/ca-certificates.crt
    index=$(pip_setting index-url)
    cp -L "$certificates" "$context/certificates.crt"
    mkdir "$context/wheels"
    while read -r folder; do
        cp -rL "$folder/." "$context/wheels/"
        n=$((n + 1))
    done < <(wheel_folders)
    {
        echo "[global]"
        echo "cert = /etc/ssl/certs/build-certificates.crt"
        echo "find-links = /opt/build-wheels"
        echo "default-timeout = 180"
        if [ -n "$index" ]; then echo "index-url = $index"; fi
    } >"$context/pip.conf"
    cat >"$context/Dockerfile" <<END
FROM $BASE
COPY certificates.crt /etc/ssl/certs/build-certificates.crt
COPY pip.conf /etc/pip.conf
COPY wheels /opt/build-wheels
END
    say "making a build image with this machine's pip settings and $n folder(s) of local wheels"
    DOCKER_BUILDKIT=0 docker build -q -t "$BUILD" "$context" >&2
    rm -rf "$context"
}

if [ "${1:-}" = stop ]; then
    # Only an engine that this script started is its to stop.
    if [ -e "$STATE/started-here" ] && [ -e /var/run/docker.pid ]; then
        as_root kill "$(cat /var/run/docker.pid)" 2>/dev/null || true
    fi
    rm -f "$STATE/started-here"
    exit 0
fi

start_engine
have docker-compose || docker compose version >/dev/null 2>&1 || packages docker-compose

if present "$OFFICIAL" || timeout 120 docker pull -q "$OFFICIAL" >&2 </dev/null; then
    say "base image: $OFFICIAL"
    echo "export NOWCAST_BASE_IMAGE=$OFFICIAL NOWCAST_BUILD_IMAGE=$OFFICIAL"
else
    say "$OFFICIAL cannot be pulled here"
    make_base
    make_build
    say "base image: $BASE"
    # Local wheels and mirrors stand in for the wheel index; the host's network reaches them.
    echo "export NOWCAST_BASE_IMAGE=$BASE NOWCAST_BUILD_IMAGE=$BUILD NOWCAST_BUILD_NETWORK=host NOWCAST_TORCH_ARGS=--prefer-binary"
fi
