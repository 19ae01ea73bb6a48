"""Many processes, on any machines that see the folder, fill one cache."""
