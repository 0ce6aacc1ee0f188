#!/usr/bin/env bash
# Runs a job on a Cloud TPU VM, on one host or on all hosts of a slice, and again after an interruption.
#
#   on the (only) host:   launch/tpu_vm.sh --config=configs/default.py --workdir=/runs/xl2
#   from anywhere, all:   TPU_NAME=my-v5e-64 ZONE=us-west4-a launch/tpu_vm.sh --config=... --workdir=/shared/xl2
#
# With several hosts the workdir must be a place that all of them see: gs://bucket/run, or a folder of Filestore.
# The repository is expected in ~/lit_jax on every host.
set -euo pipefail

if [[ -n "${TPU_NAME:-}" ]]; then
  exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
    --command="cd lit_jax && launch/tpu_vm.sh $(printf '%q ' "$@")"
fi

stop="" child="" status=0 short=0
trap 'stop=1; trap "" TERM; [[ -z "$child" ]] || kill -TERM "$child"' TERM
while [[ -z "$stop" ]]; do
  SECONDS=0
  python -m lit_jax.main "$@" &
  child=$! status=0
  wait "$child" || status=$?
  # A TERM ends that wait at once; the job is still saving.
  if [[ -n "$stop" ]]; then status=0; wait "$child" || status=$?; fi
  child=""
  # 0: done. 1: bad input, trying again would not help. Others (75: stopped from outside, 70: crashed, a signal) go on from
  # the last checkpoint; but twenty short tries in a row get nowhere: another host has given up, or this one is broken.
  if ((status <= 1)); then break; fi
  if ((SECONDS < 600)); then short=$((short + 1)); else short=0; fi
  if ((short == 20)); then
    echo "twenty tries in a row ended within ten minutes, the last with status $status: not started again" >&2
    break
  fi
  sleep 5
done
exit "$status"
