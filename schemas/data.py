"""The canonical form of data: one pyarrow schema each for demonstrations and evaluation items."""

import pyarrow as pa

MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])

TRAIN_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("messages", pa.list_(MESSAGE), False),
        pa.field("response", pa.string()),  # none: an anchor
        pa.field("context", pa.string()),
        pa.field("metadata", pa.string()),  # canonical JSON
        pa.field("row_hash", pa.string(), False),
    ]
)

EVAL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("messages", pa.list_(MESSAGE), False),
        pa.field("references", pa.list_(pa.string()), False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("metadata", pa.string()),
        pa.field("row_hash", pa.string(), False),
    ]
)

ITEM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("completion", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("status", pa.string(), False),  # a Status of schemas/results.py
        pa.field("error", pa.string()),  # why it is not scored
        pa.field("tokens", pa.int64()),
        pa.field("finished", pa.bool_()),
    ]
)
"""Per-item results of one model on one suite."""

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), False),
        pa.field("id", pa.string(), False),
        pa.field("prompt", pa.string(), False),
        pa.field("completion", pa.string(), False),
        pa.field("tokens", pa.int64(), False),
        pa.field("finished", pa.bool_(), False),
        pa.field("divergence", pa.float64(), False),
    ]
)
"""Sampled completions kept for people to read."""
