#!/usr/bin/env bash
# Questions from a table, scored against its column of answers. The demo's table is dataset=demo; for one of yours say
# dataset=parquet dataset.path=... dataset.image_column=...
set -euo pipefail
MODEL=${MODEL:-demo}
vlm-batch run dataset=demo prompt=vqa vlm=auto vlm.path="$MODEL" generation.max_new_tokens=32 output_dir=outputs/questions
vlm-batch score predictions=outputs/questions reference=answer metric=[exact_match,anls]
vlm-batch score predictions=outputs/questions reference=answer metric=[exact_match] by=task score_output=outputs/by_task.json
