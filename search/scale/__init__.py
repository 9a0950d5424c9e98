"""What a search will take before it is begun: bytes, compute, memory and hours, on one machine or many."""
