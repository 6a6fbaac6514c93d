"""What a run logs: the catalogue of metrics, run log, TensorBoard, progress, usage and banks; never
how a report charts it.
"""
