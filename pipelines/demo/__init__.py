"""What `make demo` runs on: 5,000 digits as an image folder, and the script that trained the built-in teacher."""
