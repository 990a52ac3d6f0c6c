"""A server that is in use: throughput, fairness, growth, reuse, daily service, and faults."""
