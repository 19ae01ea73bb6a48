"""The commands student-train, student-eval and student-report: parse, call, print."""
