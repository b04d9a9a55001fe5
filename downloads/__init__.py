"""Released model files: which there are, their licenses, and how they are downloaded."""
