"""The chat log: one way to write (append), the group-committing writer, ordered announcing, catching up.

See docs/architecture.md for one message's way through it.
"""
