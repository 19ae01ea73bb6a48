"""How large, how long, and whether it pays: before anything is made."""
