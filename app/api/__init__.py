"""The HTTP and WebSocket edge: parse, authorise the caller, one service call, answer. No SQL, no rules."""
