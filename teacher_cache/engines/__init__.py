"""Work on many machines, dealt out by schedulers that other people wrote. Nothing else imports this."""
