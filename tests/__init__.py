"""The tests, by the room they look into."""
