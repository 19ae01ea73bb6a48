"""The commands student-train, student-eval and student-report, a file each: they parse, call and print."""
