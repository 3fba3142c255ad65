"""Side-by-side measurements against peers; ratios of one run, not timed tests."""
