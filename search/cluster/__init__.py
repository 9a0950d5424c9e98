"""A study on the nodes of a Ray cluster: Ray itself, who works where, files without a shared disk."""
