"""Every rule and permission. No FastAPI, no SQL text."""
