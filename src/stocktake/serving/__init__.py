"""From photo bytes to a quantity: predictor, MLflow model, HTTP server, local endpoints."""
