"""What a cache holds, and what differs between two."""
