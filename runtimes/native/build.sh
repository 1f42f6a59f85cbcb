#!/usr/bin/env bash
# Builds libmythos_ops.so into runtimes/native/lib, where the Runner looks for it. Needs cmake and a C++17 compiler.
# Headers of onnxruntime and Highway: ONNXRUNTIME_INCLUDE_DIR and HIGHWAY_INCLUDE_DIR, else installed ones, else Debian's
# packages, unpacked into the build folder (no root needed). Exits with 3, saying why, where they cannot be had.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${1:-$here/build}
mkdir -p "$build"

need() { command -v "$1" >/dev/null || { echo "native operators are not built: $1 is missing"; exit 3; }; }
need cmake
need c++

# Where a header lies: the given folder, an installed one, or nothing.
find_header() { # header, given folder, folders to try
  local header=$1 given=$2 folder
  shift 2
  for folder in ${given:+"$given"} "$@"; do
    [ -f "$folder/$header" ] && { echo "$folder"; return; }
  done
  return 0
}

unpack_debian() { # onnxruntime's headers are in Debian from trixie on; the machine's own mirror and keys are used
  local sources=/etc/apt/sources.list.d/debian.sources
  command -v apt-get >/dev/null && [ -f "$sources" ] || return 0
  local packages="$build/packages" mirror key
  mkdir -p "$packages/state/lists/partial" "$packages/cache/archives/partial"
  mirror=$(sed -nE 's/^URIs: *//p' "$sources" | head -n 1)
  key=$(sed -nE 's/^Signed-By: *//p' "$sources" | head -n 1)
  echo "deb [signed-by=$key] $mirror forky main" >"$packages/sources.list"
  local apt=(apt-get -qq -o "Dir::Etc::SourceList=$packages/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State=$packages/state" -o "Dir::Cache=$packages/cache" -o APT::Sandbox::User=root)
  "${apt[@]}" update && (cd "$packages" && "${apt[@]}" download libonnxruntime-dev libhwy-dev) || return 0
  for package in "$packages"/*.deb; do dpkg-deb -x "$package" "$build/debian"; done
}

headers() {
  onnxruntime=$(find_header onnxruntime_cxx_api.h "${ONNXRUNTIME_INCLUDE_DIR:-}" /usr/include/onnxruntime \
    /usr/local/include/onnxruntime /usr/include/onnxruntime/core/session "$build/debian/usr/include/onnxruntime")
  highway=$(find_header hwy/highway.h "${HIGHWAY_INCLUDE_DIR:-}" /usr/include /usr/local/include "$build/debian/usr/include")
}
headers
if [ -z "$onnxruntime" ] || [ -z "$highway" ]; then
  unpack_debian
  headers
fi
if [ -z "$onnxruntime" ] || [ -z "$highway" ]; then
  echo "native operators are not built: no headers of onnxruntime and Highway found; install" \
    "libonnxruntime-dev and libhwy-dev, or set ONNXRUNTIME_INCLUDE_DIR and HIGHWAY_INCLUDE_DIR"
  exit 3
fi
cmake -S "$here" -B "$build/cmake" -DONNXRUNTIME_INCLUDE_DIR="$onnxruntime" -DHIGHWAY_INCLUDE_DIR="$highway" >/dev/null
cmake --build "$build/cmake" --parallel 2 >/dev/null
cmake --install "$build/cmake" --prefix "$here/lib" >/dev/null
echo "native operators built: $here/lib/libmythos_ops.so"
