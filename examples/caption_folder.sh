#!/usr/bin/env bash
# A caption for every picture of a folder, and a text file beside each, as trainers want it.
set -euo pipefail
MODEL=${MODEL:-demo}
[[ -n ${PICTURES:-} ]] || python "$(dirname "$0")/pictures.py" photos
PICTURES=${PICTURES:-photos}

# Look first: three answers, and what it will take.
vlm-batch preview experiment=caption_folder dataset.path="$PICTURES" vlm.path="$MODEL"
vlm-batch plan experiment=caption_folder dataset.path="$PICTURES" vlm.path="$MODEL"

vlm-batch run experiment=caption_folder dataset.path="$PICTURES" vlm.path="$MODEL" output_dir=outputs/captions
vlm-batch export output_dir=outputs/captions format=txt exists=skip
echo "look at outputs/captions/report.html"
