#!/usr/bin/env bash
# Killed without warning in the middle, started again with the same words, and proven whole.
set -euo pipefail
MODEL=${MODEL:-demo}
words=(dataset=demo vlm=auto vlm.path="$MODEL" write.shard_rows=100 write.sync_seconds=1 output_dir=outputs/killed)
vlm-batch run "${words[@]}" &
until compgen -G 'outputs/killed/data/*.parquet' > /dev/null; do sleep 0.2; done  # the first shard is there
kill -KILL $!
wait || true
vlm-batch status output_dir=outputs/killed
vlm-batch run "${words[@]}"
vlm-batch audit output_dir=outputs/killed deep=true
