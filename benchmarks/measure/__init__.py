"""How it is measured: time, bytes kept, peak memory, error, and the machine."""
