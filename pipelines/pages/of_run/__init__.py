"""A page about a run: what it wrote (run_facts), its curves, its student looking at crops (pictures), the page (run_report)."""
