"""Released model files: which there are, their licences, and how they are downloaded."""
