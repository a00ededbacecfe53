#!/usr/bin/env bash
# Fills the folder $1 with what tests/cluster runs: Kubernetes, etcd, kwok and grpc_health_probe, built from the
# Go modules that programs/ pins, the stages of kwok's pods and nodes, and the definitions of custom resources.
set -euo pipefail
mkdir -p "$1"
folder=$(realpath "$1")
cd "$(dirname "$0")/programs"

module() { go list -m -f '{{.Dir}}' "$1"; }

# One YAML stream of files in a module.
files_of() {
  local from=$1
  shift
  for file in "$@"; do
    echo ---
    cat "$from/$file.yaml"
  done
}

CGO_ENABLED=0 nice go build -trimpath -ldflags='-s -w' -o "$folder/" tool
files_of "$(module sigs.k8s.io/kwok)/kustomize/stage" pod/fast/pod-{ready,delete} \
  node/fast/node-initialize node/heartbeat-with-lease/node-heartbeat-with-lease >"$folder/stages.yaml"

cd ../definitions
go mod download
{
  files_of "$(module sigs.k8s.io/gateway-api)/config/crd/standard" gateway.networking.k8s.io_grpcroutes
  files_of "$(module github.com/prometheus-operator/prometheus-operator)/example/prometheus-operator-crd" \
    monitoring.coreos.com_{podmonitors,prometheusrules}
  files_of "$(module github.com/cert-manager/cert-manager)/deploy/crds" cert-manager.io_{certificates,issuers}
} >"$folder/definitions.yaml"
