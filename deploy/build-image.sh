#!/usr/bin/env bash
# Builds the server's image with docker, podman or buildah, whichever works here first.
#
#   deploy/build-image.sh [cpu|cuda] [more flags of the engine's build command]
#
# From the environment: IMAGE, its name, such as registry.example/digits-serving:1. ENGINE: docker, podman or buildah.
# MODELS, the repository that goes into the image, in this checkout and named after its model; by default models/digits.
# BASE_IMAGE, by digest for a build that can be repeated. SOURCE_DATE_EPOCH.
set -euo pipefail
cd "$(dirname "$0")/.."

device=${1:-cpu}
models=${MODELS:-models/digits}
shift $(($# > 0 ? 1 : 0))
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
tag=${IMAGE:-digits-serving:$version$([ "$device" = cpu ] || echo "-$device")}

works() { command -v "$1" >/dev/null && { [ "$1" != docker ] || docker info >/dev/null 2>&1; }; }
engine=${ENGINE:-}
for candidate in docker podman buildah; do
  if [ -z "$engine" ] && works "$candidate"; then engine=$candidate; fi
done
if [ -z "$engine" ]; then
  echo "expected docker (with its daemon running), podman or buildah, found none of them" >&2
  exit 1
fi

# Of the commit, so that two builds of it can be compared.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
revision=$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)
flags=(-f deploy/Dockerfile -t "$tag" --build-arg DEVICE="$device"
  --build-arg MODELS="$models" --build-arg MODEL_NAME="$(basename "$models")"
  --build-arg REVISION="$revision" --build-arg SOURCE_DATE_EPOCH="$epoch")
if [ -n "${BASE_IMAGE:-}" ]; then flags+=(--build-arg BASE_IMAGE="$BASE_IMAGE"); fi
# docker's own builder sets the dates of files when it exports with rewrite-timestamp; these two have a flag.
if [ "$engine" != docker ]; then flags+=(--timestamp "$epoch"); fi

echo "$engine builds $tag" >&2
"$engine" build "${flags[@]}" "$@" .
