"""vlm-batch: prompts to a vision-language model about every image of a large dataset.

    Row -> Prompt -> EncodedSample -> (Batch) -> Answer -> part-00042.parquet

    dataset/  files -> Row                 (1)
    prompt/   Row -> Prompt                (2)
    tensors/  Prompt -> EncodedSample      (3)
    vlm/      EncodedSample -> Answer      (4)
    write/    Answer -> Parquet            (5)

Read records.py, then run.py, then the stage you came for.
"""

__version__ = "0.1.0"
