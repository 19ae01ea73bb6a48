"""The commands of student-eval, a group of them a file, and what they share: subjects by their words, the loop over them."""
