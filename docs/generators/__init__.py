"""What makes pages of the documentation out of the code and of files: settings, benchmarks, equations."""
