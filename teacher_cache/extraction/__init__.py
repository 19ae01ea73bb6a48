"""Fills a cache: the stage of crops, the stage of targets, and how both are shared."""
