"""The gRPC edge: turns calls and streams into the runtime's terms and its errors into status codes. Nothing else."""
