"""What a store keeps of a teacher's output: fitted to a sample, and worked out where the output is."""
