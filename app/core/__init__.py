"""Leaves: settings, errors, clock, ids, hashing. Nothing here imports from the rest of the app."""
