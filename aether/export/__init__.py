"""Networks for other frameworks, each export checked against the network that it came from."""
