"""Training loops: callers import from the modules, so that each brings only what it needs."""
