#!/usr/bin/env bash
# Runs a job on several TPU slices, made as one queued resource with --node-count: their hosts find each other through the
# MEGASCALE_* variables that the service sets. mesh.data is split over the slices first, mesh.fsdp stays inside one.
#
#   NAME=my-2-slices ZONE=us-west4-a launch/multislice.sh --config=... --config.mesh.fsdp=16 --workdir=/shared/xl2
set -euo pipefail

exec gcloud alpha compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=all --worker=all \
  --command="cd lit_jax && launch/tpu_vm.sh $(printf '%q ' "$@")"
