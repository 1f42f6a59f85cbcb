#!/usr/bin/env bash
# Unpacks Debian's headers under a folder, as any user, installing nothing: debian_headers.sh FOLDER [PACKAGE…], by default those of
# onnxruntime and Highway. SUITE and ARCHITECTURE may name other ones than forky and this machine's.
# Where it cannot, it prints why. onnxruntime's are in Debian from 13 on, so forky's are taken whatever the machine runs.
set -euo pipefail
folder=$1
shift
[ $# -gt 0 ] || set -- libonnxruntime-dev libhwy-dev
sources=/etc/apt/sources.list.d/debian.sources
keys=/usr/share/keyrings/debian-archive-keyring.gpg

fail() { echo "$1"; exit 1; }
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "no apt-get and dpkg-deb here"
[ -f "$keys" ] || fail "no $keys here"
mirror=
[ -f "$sources" ] && mirror=$(sed -nE 's/^URIs: *([^ ]+).*/\1/p' "$sources" | head -n 1)

packages=$folder.packages # beside it, with lists and caches of their own, so that the machine's apt is not touched
mkdir -p "$packages/state/lists/partial" "$packages/cache/archives/partial"
cd "$packages"
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} ${SUITE:-forky} main" >sources.list
apt=(apt-get -qq -o "Dir::Etc::SourceList=$PWD/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State=$PWD/state"
  -o "Dir::Cache=$PWD/cache" -o APT::Sandbox::User=root -o Acquire::Retries=1 -o Acquire::http::Timeout=20
  -o APT::Update::Error-Mode=any)
[ -z "${ARCHITECTURE:-}" ] || apt+=(-o "APT::Architecture=$ARCHITECTURE" -o "APT::Architectures::=$ARCHITECTURE")
{ "${apt[@]}" update && "${apt[@]}" download "$@"; } >log 2>&1 ||
  fail "apt-get: $(grep -m 1 '^E:' log || tail -n 1 log)"
for package in *.deb; do dpkg-deb -x "$package" "$folder"; done
