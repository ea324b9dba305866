#!/usr/bin/env bash
# Builds docker/Dockerfile and runs the demo in the image, without Docker. Needs root, buildah and, unless BASE names an
# image, debootstrap (Debian: apt-get install buildah debootstrap). Works in a temporary folder of about 15 GB and removes
# it afterwards.
#
#   docker/check.sh          the whole demo
#   docker/check.sh --fast   trains for one epoch instead of eight: 7 minutes of processor time in all
#
# STACK         cuda13 (default) or cuda12, whose packages take several GB more; torch's CPU code is what runs
# BASE          the base image (default: a fresh Debian without GPU support, which checks the CPU)
# SUITE, MIRROR what debootstrap installs (default: bookworm, from debootstrap's own mirror)
# BUILDAH_ARGS  more arguments for `buildah build`, for example "--volume /etc/pip.conf:/etc/pip.conf:ro"
# TMPDIR        the parent of the temporary folder
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "docker/check.sh: $1" >&2; exit "${2:-1}"; }
demo=(python tools/demo.py)
case "${1-}" in
  '') ;;
  --fast) demo+=(--train-images 1920) ;;
  *) fail "unknown argument $1: use --fast or none" 2 ;;
esac
[ "$(id -u)" = 0 ] || fail "needs root to run commands in the image: run it as root"
command -v buildah >/dev/null || fail "buildah is missing: apt-get install buildah"
[ -n "${BASE-}" ] || command -v debootstrap >/dev/null ||
  fail "debootstrap is missing: apt-get install debootstrap, or give BASE=<image>"

# chroot and vfs need no kernel support, so they work inside containers and virtual machines too
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION-chroot} STORAGE_DRIVER=${STORAGE_DRIVER-vfs}
# the path as it appears in /proc/mounts, which escapes blanks
store=$(realpath "$(mktemp --directory --tmpdir alexnet-image-XXXXXX)")
case $store in
  *[[:space:]\\]*) rmdir "$store"; fail "the temporary folder $store has blanks in its path: set TMPDIR to one without" 2 ;;
esac
b() { buildah --root "$store/storage" --runroot "$store/run" "$@"; }
clean() {
  b rm --all >/dev/null 2>&1 || true
  # if something of the host is still mounted there, delete nothing
  if grep -q " $store/" /proc/mounts; then
    awk -v store="$store/" 'index($2, store) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount || true
  fi
  if grep -q " $store/" /proc/mounts; then
    echo "docker/check.sh: $store is still mounted: unmount and delete it by hand" >&2
  else
    rm -rf --one-file-system "$store"
  fi
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

base=${BASE-}
if [ -z "$base" ]; then
  base=localhost/base
  echo "== a fresh ${SUITE:=bookworm}"
  container=$(b from scratch)
  # shellcheck disable=SC2086 -- no argument if MIRROR is not set
  debootstrap --force-check-gpg --variant=minbase "$SUITE" "$(b mount "$container")" ${MIRROR-} \
    >"$store/debootstrap.log" || { tail -3 "$store/debootstrap.log" >&2; fail "debootstrap failed"; }
  b umount "$container" >/dev/null
  b commit --quiet --rm "$container" "$base" >/dev/null
fi

echo "== docker/Dockerfile on $base"
# shellcheck disable=SC2086 -- several arguments
b build ${BUILDAH_ARGS-} --layers=false --build-arg "BASE=$base" --build-arg "STACK=${STACK-cuda13}" --tag localhost/alexnet-dali \
  --file docker/Dockerfile .

echo "== the demo in it, as its own user"
container=$(b from localhost/alexnet-dali)
in_image() { b run "$container" -- "$@"; }
user=$(in_image id -u)
[ "$user" = 10001 ] || fail "the image's user is $user, not 10001"
in_image sh -c '! touch /etc/written 2>/dev/null' || fail "the image's user can write to /etc"
in_image sh -c 'touch /work/written && rm /work/written' || fail "the image's user cannot write to /work"
in_image alexnet-train --help >/dev/null
in_image "${demo[@]}"
for picture in batch curves filters; do
  in_image test -s "demo/$picture.png" || fail "the demo drew no $picture.png"
done
echo "docker/check.sh: the image builds and the demo runs in it as user $user"
