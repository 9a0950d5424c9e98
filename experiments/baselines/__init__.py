"""Other ways to compress to a size, each faithful to its source, on this project's bank and evaluator."""
