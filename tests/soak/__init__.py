"""A long mixed load that must leave nothing behind; see test_soak.py."""
