#!/usr/bin/env bash
# Sees to what the tests of C++ compile and emulate with, from Debian's packages where root may install them. Never fails: it
# says what is missing and why, and the tests that need it skip.
set -euo pipefail
missing=()
command -v "${CXX:-c++}" >/dev/null || missing+=(g++)
has_header() { printf '#include <%s>' "$1" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; }
has_header openssl/evp.h || missing+=(libssl-dev)
has_header nlohmann/json.hpp || missing+=(nlohmann-json3-dev)
has_header re2/re2.h || missing+=(libre2-dev)
has_header gtest/gtest.h || missing+=(libgtest-dev)
if [ "$(uname -m)" != aarch64 ]; then # there the NEON kernels run as they are
  command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
  command -v qemu-aarch64 >/dev/null || command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

give_up() { echo "${missing[*]} missing, so some tests of C++ will skip: $1"; exit 0; }
command -v apt-get >/dev/null || give_up "there is no apt-get here to install them with"
[ "$(id -u)" -eq 0 ] || give_up "only root may install them; run: sudo apt-get install ${missing[*]}"
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt-get -qq update >/dev/null 2>&1 || true # another source may be broken; what matters is whether the packages can be had
apt-get -qq install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}" >"$log" 2>&1 ||
  give_up "apt-get: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")"
