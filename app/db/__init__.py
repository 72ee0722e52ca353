"""Tables, wire shapes and the only SQL."""
