"""The C sources of the runtime, compiled anew for every model and target."""
