"""What runs a compiled model: the C runtime, the artifact, its loader, and devices."""
