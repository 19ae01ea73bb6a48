"""Looking at single crops: what the teacher saw, what it said, and what a student would see of it."""
