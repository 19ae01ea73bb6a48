"""Which patches a student sees."""
