"""A bundle served over HTTP: hand-overs between machines, and whole pictures."""
