"""The only SQL, one file per aggregate. Repositories flush; they never commit."""
