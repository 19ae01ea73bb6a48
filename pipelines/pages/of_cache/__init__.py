"""The page of a cache: what is in it, how far it can be trusted, what its tokens look like.

Each module works out one thing as plain values; `cache_report` puts them together for the template
`pages/cache_report.html`.
"""
