"""How a command speaks while it works and how it ends: progress, signals, one sentence for an error, an exit code."""
