"""The models, the data and the measurements behind `python -m benchmarks.compare`."""
