"""What a running server is asked and tells: reports, metrics, counted experts."""
