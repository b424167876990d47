"""What is between HTTP and a Predictor, in plain Python: requests, answers, the application."""
