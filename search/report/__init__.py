"""The report of a study: one page that answers whether a config is better, what it costs and why."""
