"""Pictures of single crops: what the teacher saw, what it made of them, and what a student would see.

`show` goes from the options of `teacher-cache show` to a file; `crops` reads, `laws` draws masks, `picture` lays out `panels`.
"""
