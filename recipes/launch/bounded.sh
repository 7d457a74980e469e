#!/bin/bash
# Start a launcher that is sure to end once it is asked to: launchers were seen to ignore TERM after the link to another
# node was lost. TERM is passed on; what is still there GRACE seconds later is killed. Give at least a step, a save and
# 5 seconds, and at least 30, which is what torchrun gives its processes.
#   GRACE=60 recipes/launch/bounded.sh accelerate launch --config_file recipes/launch/ddp.yaml RECIPE
# LIMIT (for example 24h) asks it to end by itself after that time; without it a run may take as long as it wants.
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "error: no command given; GRACE=60 $0 accelerate launch ... RECIPE" >&2
    exit 2
fi
exec timeout --signal=TERM --kill-after="${GRACE:-60}" "${LIMIT:-0}" "$@"
