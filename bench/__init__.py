"""The benchmarks: ``python -m bench``. How they are run and what they promise: `bench.__main__`."""
