"""`python -m pipelines.study`: the teacher, the cells, the tables."""
