"""A page about a run: facts.py reads what the run wrote, pictures.py lets its student look at crops, page.py puts it together."""
