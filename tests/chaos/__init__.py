"""What goes wrong in earnest: killed servers, readers that stall, databases that vanish."""
