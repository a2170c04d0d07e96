#!/usr/bin/env bash
# Builds both images and runs the federation of docker-compose.yml to its end, then looks at what it left behind.
#
#   tests/compose/run.sh             needs Docker and Compose (v2, or docker-compose 1.29)
#   WORKERS=8 tests/compose/run.sh   another number of workers; 5 unless given
#   BUILD_FLAGS=--network=host ...   flags for `docker build`
#   KEEP=1 ...                       leave containers and volumes for a look
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORKERS=${WORKERS:-5}
TIMEOUT_SECONDS=${TIMEOUT_SECONDS:-900}
project=raflora-test-$$
export RAFLORA_PORT=${RAFLORA_PORT:-17070}
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
compose+=(--project-name "$project")

fail() {
  echo "FAILED: $*" >&2
  "${compose[@]}" logs --tail=40 >&2 || true
  exit 1
}
tidy() { [[ -n ${KEEP:-} ]] || "${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true; }
trap tidy EXIT

in_coordinator() { "${compose[@]}" exec -T coordinator "$@"; }
phase_of() { in_coordinator raflora status --format json | sed -n 's/.*"phase": "\([A-Z_]*\)".*/\1/p' | head -1; }

echo "== images"
for target in coordinator worker; do
  # shellcheck disable=SC2086 # BUILD_FLAGS is a list
  docker build ${BUILD_FLAGS:-} --quiet --target "$target" --tag "raflora-$target" .
done
docker image ls --format '{{.Repository}} {{.Size}}' | grep '^raflora-'
for target in coordinator worker; do
  [[ $(docker run --rm --entrypoint id "raflora-$target" -u) == 10001 ]] || fail "the $target's image runs as root"
  docker run --rm "raflora-$target" --version >/dev/null || fail "the $target's image has no working raflora"
done
if docker run --rm --entrypoint python3 raflora-coordinator -c 'import torch' 2>/dev/null; then
  fail "the coordinator's image has torch"
fi

echo "== $WORKERS workers"
"${compose[@]}" up --detach --no-build --scale worker="$WORKERS"

begun=$SECONDS
until [[ $(phase_of 2>/dev/null) == PHASE_FINISHED ]]; do
  ((SECONDS - begun < TIMEOUT_SECONDS)) || fail "not finished after $TIMEOUT_SECONDS s"
  sleep 3
done
echo "== finished after $((SECONDS - begun)) s"
in_coordinator raflora rounds
in_coordinator raflora clients

for id in $("${compose[@]}" ps --quiet worker); do
  code=$(timeout 60 docker wait "$id") || fail "worker $id does not end"
  [[ $code == 0 ]] || fail "worker $id ended with $code"
done
echo "== all workers ended with 0"

in_coordinator raflora health || fail "the coordinator no longer answers"
[[ $(in_coordinator raflora status --format json) == *'"security": "mutual TLS: '* ]] ||
  fail "the status does not say that connections are mutual TLS"
# `raflora health` has just been answered: what is refused here is the connection in the clear, and it must say so.
if in_clear=$(in_coordinator raflora health --coordinator coordinator:7070 --insecure 2>&1); then
  fail "a call in the clear was answered: $in_clear"
fi
[[ $in_clear == *"it speaks TLS, but this side speaks in the clear"* ]] || fail "refused for another reason: $in_clear"
echo "== mutual TLS: the status says so, and a call in the clear is refused"
in_coordinator find /adapter -name adapter_model.safetensors | grep -q . || fail "no adapter in the volume"
in_coordinator find /adapter -type f
[[ $(in_coordinator raflora clients --format json | grep -c '"client_id"') == "$WORKERS" ]] || fail "not every worker joined"

echo "== stock PEFT makes of the adapter what the workers measured (the base alone names 8 % of the digits)"
measured=$(docker run --rm --volume "${project}_adapter:/adapter:ro" --entrypoint sh raflora-worker -ec \
  'raflora digits /tmp/example --sample-for anybody >&2
   python3 -m simulation.check_adapter /adapter/digits /tmp/example/test.jsonl')
echo "$measured"
accuracy=$(sed -n 's/.*"accuracy": \([0-9.]*\).*/\1/p' <<<"$measured")
awk -v found="$accuracy" 'BEGIN { exit !(found > 0.5) }' || fail "accuracy $accuracy; more than 0.5 is expected"
echo "1 passed, 0 failed"
