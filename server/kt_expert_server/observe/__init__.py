"""What operators see: Prometheus metrics and the health pages."""
