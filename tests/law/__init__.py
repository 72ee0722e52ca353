"""Properties that must hold whatever happens, searched for by random walks."""
