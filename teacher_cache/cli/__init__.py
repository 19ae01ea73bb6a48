"""The commands of teacher-cache: parse, call, print."""
