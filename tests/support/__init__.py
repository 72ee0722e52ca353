"""What tests lean on: databases, servers, accounts."""
