#!/usr/bin/env bash
# Answers in the forms that trainers read: LLaVA conversations, and webdataset tars with pictures and texts.
set -euo pipefail
MODEL=${MODEL:-demo}
[[ -n ${PICTURES:-} ]] || python "$(dirname "$0")/pictures.py" photos
PICTURES=${PICTURES:-photos}
vlm-batch run experiment=caption_folder dataset.path="$PICTURES" vlm.path="$MODEL" output_dir=outputs/training
vlm-batch export output_dir=outputs/training format=llava to=outputs/llava.json
vlm-batch export output_dir=outputs/training format=webdataset to=outputs/tars
