"""How a step is shared by processes and cut up in each."""
