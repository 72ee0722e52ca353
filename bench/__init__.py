"""The benchmark: `python -m bench` measures Dialect against an ordinary FastAPI chat server on this machine."""
