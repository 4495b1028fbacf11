"""Benchmarks, one file a cost; `jattrib bench NAME` or `python -m bench.NAME --out FILE` runs one."""
