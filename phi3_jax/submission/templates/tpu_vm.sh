#!/bin/bash
# Startup script of every host of a TPU slice: mounts the share with the studies and trains in the image. It runs at
# each boot, so a host that was restarted joins again, and training goes on from the newest whole checkpoint.
set -u
mkdir -p -- @mount@
if ! mountpoint -q -- @mount@; then
  command -v mount.nfs > /dev/null || { apt-get update && apt-get install -y nfs-common; }
  mount -t nfs -- @volume@ @mount@ || exit 1
fi
mkdir -p -- @logs@
gcloud auth configure-docker @registry@ --quiet
docker rm --force phi3-train 2> /dev/null
for attempt in 1 2 3 4 5; do
  docker run --rm --name phi3-train --privileged --network=host --stop-timeout=120 --volume @binding@ \
    -- @image@ @command@ >> @logs@/@name@-"$(hostname)".out 2>&1 && break
  sleep 30
done
