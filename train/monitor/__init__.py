"""Metrics of a run in progress: metrics.jsonl, TensorBoard, and the console."""
